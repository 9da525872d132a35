"""Actors on a real Ray: pools grow with the work, do not pause between shards, get over a hang, show metrics."""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.request
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.jobs import Job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

MakeRayJob = Callable[..., tuple[Job, EngineFolder]]
Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]


def assert_every_row_once(job: Job, num_rows: int) -> None:
    rows = read_output(str(job.out))
    assert sorted(rows["id"].to_pylist()) == sorted(f"r{n}" for n in range(num_rows))
    assert rows["error"].null_count == num_rows


def pids(folder: EngineFolder) -> set[int]:
    return {load["pid"] for load in folder.loads()}


@pytest.mark.parametrize("holds_lock", [False, True])
def test_a_hung_engine_is_replaced_and_its_shards_are_made_again(
    make_ray_job: MakeRayJob, holds_lock: bool, capsys: Capture
) -> None:
    job, folder = make_ray_job(
        40, rows_per_shard=10, step_delay_s=0.1, hang_once_after_rows=12, hang_holds_lock=holds_lock
    )
    job.config["engine"]["watchdog_s"] = 2.0
    assert run_cli(["run", job.write()]) == ExitCode.OK, capsys.readouterr().err
    assert_every_row_once(job, 40)
    assert (folder.path / "hung").exists()
    assert len(pids(folder)) == 2


def test_a_pool_grows_while_shards_wait_and_starts_with_the_fewest(make_ray_job: MakeRayJob) -> None:
    job, folder = make_ray_job(120, rows_per_shard=10, wait_for_loads=3)
    job.config["ray"]["actors"] = {"min": 1, "max": 3}
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert_every_row_once(job, 120)
    assert len(pids(folder)) == 3


def test_a_pool_does_not_grow_beyond_its_work(make_ray_job: MakeRayJob) -> None:
    job, folder = make_ray_job(10, rows_per_shard=10)
    job.config["ray"]["actors"] = {"min": 1, "max": 3}
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert_every_row_once(job, 10)
    assert len(pids(folder)) == 1


def test_rows_of_the_next_shard_enter_before_those_of_the_one_before_have_left(make_ray_job: MakeRayJob) -> None:
    num_shards = 6
    job, folder = make_ray_job(24 * num_shards, rows_per_shard=24, step_delay_s=0.08, note_steps=True)
    assert run_cli(["run", job.write()]) == ExitCode.OK
    shard_of = {row: place for place, rows in enumerate(ids_by_shard(job)) for row in rows}
    steps = [{shard_of[row] for row in rows} for rows in folder.steps()]
    first = {place: min(n for n, shards in enumerate(steps) if place in shards) for place in range(num_shards)}
    last = {place: max(n for n, shards in enumerate(steps) if place in shards) for place in range(num_shards)}
    order = sorted(first, key=first.__getitem__)
    assert all(first[later] <= last[earlier] for earlier, later in pairwise(order))
    full = [rows for rows in folder.steps()[: first[order[-1]]] if len(rows) == 4]
    assert len(full) >= 0.9 * first[order[-1]]


def ids_by_shard(job: Job) -> list[list[Any]]:
    return [pq.read_table(file)["id"].to_pylist() for file in sorted(job.out.glob("*.parquet"))]


def test_a_process_that_ends_while_it_loads_is_tried_again_and_then_told_in_one_line(
    make_ray_job: MakeRayJob, capsys: Capture
) -> None:
    job, folder = make_ray_job(10, rows_per_shard=10, die_at_load=True)
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dspark-batch:")]
    assert "without finishing a shard" in line
    assert "while it loaded the model, the process ended without a word (killed, out of memory, or crashed)" in line
    assert len(pids(folder)) == 4


@pytest.mark.parametrize("backend", ["ray", "local"])
def test_what_engines_warn_of_while_they_load_is_shown_once(
    make_ray_job: MakeRayJob, backend: str, capsys: Capture
) -> None:
    num_engines = 2 if backend == "ray" else 1
    warning = "native kernels are off (scripted)"
    job, folder = make_ray_job(40, rows_per_shard=10, wait_for_loads=num_engines, warning=warning)
    job.config["ray"]["actors"] = 2
    assert run_cli(["run", job.write(), f"engine.backend={backend}"]) == ExitCode.OK
    assert len(folder.loads()) == num_engines
    assert capsys.readouterr().err.count(f"warning: {warning}\n") == 1


@pytest.mark.parametrize(
    ("factory", "code", "words"),
    [
        ("too_large", ExitCode.FATAL, "lower engine.kv_cache_gib"),
        ("contradicting", ExitCode.BAD_CONFIG, "  engine.max_context: 99 is more"),
    ],
)
def test_an_engine_that_cannot_start_ends_the_run_in_words_of_its_own(
    make_ray_job: MakeRayJob, capsys: Capture, monkeypatch: pytest.MonkeyPatch, factory: str, code: int, words: str
) -> None:
    job, _ = make_ray_job(10, rows_per_shard=10)
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, f"dspark_batch.testing.engine_factories:{factory}")
    assert run_cli(["run", job.write()]) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert "ray::" not in err


class Scraper:
    """Reads a Prometheus endpoint until everything asked for is there, or it is closed; keeps the last text with it."""

    def __init__(self, url: str, names: Sequence[str]) -> None:
        self.text = ""
        self._url, self._names = url, names
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._closed.wait(0.3) and not all(f"\n{name}{{" in self.text for name in self._names):
            with contextlib.suppress(OSError), urllib.request.urlopen(self._url, timeout=10) as answer:
                self.text = answer.read().decode()


def test_rows_tokens_and_load_are_on_the_prometheus_endpoint_of_the_node(make_ray_job: MakeRayJob) -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus", reason="the endpoint needs ray[default]")
    import ray

    from dspark_batch.ray_data.metrics import COMMIT_COUNTERS, GAUGES, TAGS, TOKEN_COUNTERS

    job, folder = make_ray_job(200, rows_per_shard=20, step_delay_s=0.08)
    job.config["engine"]["max_concurrency"] = 4
    names = [f"ray_{name}_total" for name in (*COMMIT_COUNTERS, *TOKEN_COUNTERS) if name != "dspark_batch_failed_rows"]
    names += [f"ray_{name}" for name in GAUGES]
    with Scraper(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", names) as scraper:
        assert run_cli(["run", job.write()]) == ExitCode.OK
    values = {}
    for line in scraper.text.splitlines():
        name, _, rest = line.partition("{")
        if name in names and f'model="{folder.path}"' in rest:  # the node still tells of earlier runs
            assert all(f'{tag}="' in rest for tag in TAGS)
            values[name] = float(rest.rpartition(" ")[2])
    assert set(values) == set(names)
    assert values["ray_dspark_batch_shard_commits_total"] < values["ray_dspark_batch_rows_total"] <= 200
    assert min(values[name] for name in names if name.endswith("_total")) > 0
    assert values["ray_dspark_batch_running_rows"] <= 4


def test_the_pipeline_of_the_guide_runs(ray_of_four: None, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import ray\n.*?)```", text, re.DOTALL)
    EngineFolder.make(tmp_path / "engine")
    (tmp_path / "reviews").mkdir()
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "text": ["one", None, "three"]}), tmp_path / "reviews" / "x.parquet"
    )
    example = example.replace('"/data/', f'"{tmp_path}/').replace("smollm2-135m", str(tmp_path / "engine"))
    exec(compile(example, "docs/guide.md", "exec"), {})
    rows = pa.concat_tables(map(pq.read_table, (tmp_path / "summaries").glob("*.parquet"))).sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["summary"] is None for row in rows] == [False, True, False]
    assert rows[1]["error"]["code"] == "null_prompt"
