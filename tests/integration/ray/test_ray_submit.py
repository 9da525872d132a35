"""``ray job submit`` against a real cluster: relative paths, a stop in the middle, and the same command again."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.jobs import reviews
from dspark_batch.testing.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[3]
ENTRYPOINT = ["python", "jobs/generate.py", "configs/label.yaml"]
NUM_ROWS = 120
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    for name in ("aiohttp", "opencensus", "opentelemetry.exporter.prometheus"):
        pytest.importorskip(name, reason="Ray takes jobs only with ray[default]")
    with ray_head({ENGINE_FACTORY_VARIABLE: FACTORY}) as running:
        yield running


def project(folder: Path, *, out: Path, engine: EngineFolder) -> Path:
    """A working directory as a user has it: entry point, config with relative paths, data."""
    for name in ("jobs", "configs", "data"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "generate.py", folder / "jobs")
    pq.write_table(reviews(NUM_ROWS), folder / "data" / "reviews.parquet")
    config = {
        "model": {"target": str(engine.path)},
        "input": {"path": "data/*.parquet", "id": "id"},
        "prompt": {"template": "Say {{ text }}"},
        "sampling": {"temperature": 0.7},
        "output": {"path": str(out), "column": "answer"},
        "shards": {"rows": 6},
        "ray": {"shards_in_flight": 2},
    }
    (folder / "configs" / "label.yaml").write_text(yaml.safe_dump(config))
    return folder


def num_commits(out: Path) -> int:
    return len(list((out / "_dspark" / "manifest").glob("*.json")))


def wait_for(condition: Callable[[], bool], *, what: str, log: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}:\n{log()[-3000:]}"
        time.sleep(0.1)


def test_a_job_with_relative_paths_runs_from_its_working_directory(head: RayHead, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = project(tmp_path / "project", out=out, engine=EngineFolder.make(tmp_path / "engine"))
    told = head.submit("once", working_dir=folder, entrypoint=ENTRYPOINT)
    assert "'once' succeeded" in told, told
    assert f"done: {NUM_ROWS} rows in 20 shards" in told
    assert sorted(read_output(str(out))["id"].to_pylist()) == sorted(f"r{n}" for n in range(NUM_ROWS))


@pytest.mark.slow
def test_a_job_that_is_stopped_and_submitted_again_from_a_changed_folder_ends_with_every_row_once(
    head: RayHead, tmp_path: Path
) -> None:
    out, engine = tmp_path / "out", EngineFolder.make(tmp_path / "engine", step_delay_s=0.15)
    folder = project(tmp_path / "project", out=out, engine=engine)
    head.submit_and_go_on("try-1", working_dir=folder, entrypoint=ENTRYPOINT)
    wait_for(lambda: num_commits(out) >= 2, what="commits", log=lambda: head.ray("job", "logs", "try-1").stdout)
    stopped = head.ray("job", "stop", "try-1")
    assert "was stopped" in stopped.stdout + stopped.stderr
    before = {file.name: file.stat().st_ino for file in out.glob("*.parquet")}

    (folder / "README.md").write_text("another package, at another place\n")
    EngineFolder.make(engine.path)
    told = head.submit("try-2", working_dir=folder, entrypoint=ENTRYPOINT)
    assert "'try-2' succeeded" in told, told
    assert f"done: {NUM_ROWS} rows in 20 shards" in told
    num_rows_left, num_shards_left = map(int, re.findall(r"(\d+) rows in (\d+) shards to do", told)[0])
    assert num_rows_left == 6 * num_shards_left
    assert 1 <= num_shards_left <= 18
    after = {file.name: file.stat().st_ino for file in out.glob("*.parquet")}
    assert len([name for name in before if after[name] == before[name]]) >= 20 - num_shards_left
    rows = read_output(str(out))
    assert sorted(rows["id"].to_pylist()) == sorted(f"r{n}" for n in range(NUM_ROWS))
    assert rows["error"].null_count == NUM_ROWS
    assert (out / "_SUCCESS").exists()
    assert "nothing to do" in head.submit("try-3", working_dir=folder, entrypoint=ENTRYPOINT)


@pytest.mark.slow
def test_a_job_with_a_wrong_config_fails_with_every_problem_in_its_log(head: RayHead, tmp_path: Path) -> None:
    folder = project(tmp_path / "project", out=tmp_path / "out", engine=EngineFolder.make(tmp_path / "engine"))
    told = head.submit("wrong", working_dir=folder, entrypoint=[*ENTRYPOINT, "sampling.top_p=7"])
    assert "sampling.top_p: must lie in (0, 1], got 7" in told
    relative = head.submit("relative", working_dir=folder, entrypoint=[*ENTRYPOINT, "output.path=out"])
    assert "output.path: 'out' is relative, and the working directory of this Ray job is a temporary copy" in relative
    assert "'relative' failed" in relative
