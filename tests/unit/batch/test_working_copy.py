"""Inputs in the copy of a working directory that a Ray job brought: known by content, wherever the copy lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.fingerprint import fingerprint_fields
from dspark_batch.batch.planning import ResolvedPlan, resolve_plan
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.working_copy import copy_root
from dspark_batch.errors import InputError
from dspark_batch.job.config import JobConfig

MakeConfig = Callable[..., JobConfig]


def unpack(tmp_path: Path, package: str, *, texts: list[str], mtime_s: int) -> Path:
    """A copy as Ray unpacks it: the files get the time of unpacking."""
    root = tmp_path / "session" / "runtime_resources" / "working_dir_files" / package
    (root / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), root / "data" / "in.parquet", row_group_size=2)
    os.utime(root / "data" / "in.parquet", (mtime_s, mtime_s))
    return root


def resolved(make_config: MakeConfig, root: Path, *, mode: str | None = None) -> tuple[JobConfig, ResolvedPlan]:
    config = make_config(input={"path": str(root / "data"), "incremental": mode}, shards={"rows": 2})
    written = config.model_copy(update={"input": config.input.model_copy(update={"path": "data"})})
    run = RunStore(config.output.path)
    plan = resolve_plan(
        config,
        run=run,
        fields_of=lambda digest: fingerprint_fields(written, weights_fingerprint="w", input_digest=digest),
    )
    run.open(plan.fields)
    plan.save(run)
    return config, plan


def test_the_root_of_a_copy_is_found_in_its_paths() -> None:
    root = "/tmp/ray/s/runtime_resources/working_dir_files/_ray_pkg_0a"
    assert copy_root(f"{root}/data/x.parquet") == copy_root(root) == root
    assert copy_root("/data/x.parquet") is None
    assert copy_root("/data/working_dir_files") is None


@pytest.mark.parametrize("mode", [None, "files"])
def test_a_plan_goes_on_in_another_copy_with_the_same_content(
    make_config: MakeConfig, tmp_path: Path, mode: str | None
) -> None:
    texts = ["a", "b", "c"]
    _, first = resolved(make_config, unpack(tmp_path, "_ray_pkg_1", texts=texts, mtime_s=1), mode=mode)
    second = unpack(tmp_path, "_ray_pkg_2", texts=texts, mtime_s=2)
    config, again = resolved(make_config, second, mode=mode)
    assert again.is_saved
    assert again.plan.digest == first.plan.digest
    assert [shard.name for shard in again.plan.shards] == [shard.name for shard in first.plan.shards]
    assert all(shard.path.startswith(f"{second}/") for shard in again.plan.shards)
    reader = ShardReader(config, plan_schema=again.plan.schema)
    assert [row for shard in again.plan.shards for row in reader.read(shard).table["text"].to_pylist()] == texts


def test_another_content_is_another_input_also_with_the_same_size_and_time(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    resolved(make_config, unpack(tmp_path, "_ray_pkg_1", texts=["a"], mtime_s=1))
    with pytest.raises(InputError, match=r"changed: .*SHA-256"):
        resolved(make_config, unpack(tmp_path, "_ray_pkg_2", texts=["b"], mtime_s=1))
