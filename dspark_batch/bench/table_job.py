"""What a table job adds to the bare engine: a Ray job with one actor against ``BatchEngine.generate``, same rows.

``python -m dspark_batch.bench.table_job --rows 2000 --repeats 3``. The job's time runs from the moment its engine is
loaded to its last commit: it reads, renders and tokenizes the prompts, and writes and commits Parquet. The bare engine
gets rendered messages and its results are dropped. The texts of both are compared. The time within steps of the engine
is shown too: what a job takes beyond it is the job's own, while a step lasts as long as the machine lets it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    MaxNewTokens,
    Repeats,
    Rows,
    Target,
    Threads,
    run_module,
    write_json,
)
from dspark_batch.bench.table_rows import TEMPLATE, benchmark_rows
from dspark_batch.core import Message, Request, Result
from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.job.config import JobConfig

NOTE_FILE_VARIABLE = "DSPARK_BATCH_BENCH_NOTE"
"""Environment variable with the file in which the worker of a measured job notes when its engine was loaded, and the
time within its steps."""

KV_CACHE_GIB = 1.0
_FACTORY = "dspark_batch.bench.table_job:noted_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured. target: a model's name or path. backend: of the job. shard_rows: rows of a shard. threads: of
    the engine, on both sides; None: every core, which leaves none to Ray."""

    num_rows: int
    num_repeats: int
    max_new_tokens: int
    target: str
    drafter: str = "auto"
    backend: str = "ray"
    shard_rows: int = 128
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over the rows. step_s: of elapsed_s, within steps of the engine. whole_s: with the start of Ray and the
    model's loading. texts: in the table's order."""

    elapsed_s: float
    step_s: float
    whole_s: float
    num_tokens: int
    texts: list[str | None]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s


def noted_engine(config: EngineConfig) -> BatchEngine:
    """The engine factory of the measured job."""
    from dspark_batch.engine.engine import BatchEngine

    class NotingEngine(BatchEngine):
        def note(self) -> None:
            values = {"loaded_s": loaded_s, "step_s": self.stats.total_s}
            Path(os.environ[NOTE_FILE_VARIABLE]).write_text(json.dumps(values), encoding="utf-8")

        def step(self) -> list[tuple[int, Result]]:
            finished = super().step()
            if not self.num_unfinished:
                self.note()
            return finished

    engine = NotingEngine.from_config(config)
    loaded_s = time.time()
    engine.note()
    return engine


def job_values(setup: Setup, *, folder: Path, name: str) -> dict[str, Any]:
    """The job's config; its table and its output lie in ``folder``."""
    threads = setup.threads or len(os.sched_getaffinity(0))
    return {
        "model": {"target": setup.target},
        "speculation": {"drafter": setup.drafter},
        "input": {"path": str(folder / "rows.parquet"), "id": "id"},
        "prompt": {"template": TEMPLATE},
        "sampling": {"max_new_tokens": setup.max_new_tokens},
        "engine": {"backend": setup.backend, "kv_cache_gib": KV_CACHE_GIB, "threads": threads},
        "shards": {"rows": setup.shard_rows},
        "output": {"path": str(folder / name), "column": "text"},
    }


def measure_job(setup: Setup, *, folder: Path, name: str) -> Pass:
    """One run of the whole job, as ``dspark-batch run`` does it."""
    from dspark_batch.batch.commit import read_output
    from dspark_batch.job.loader import dump_config
    from dspark_batch.job.runner import run_job

    config, note = folder / f"{name}.yaml", folder / f"{name}.note"
    config.write_text(dump_config(_config(setup, folder=folder, name=name)), encoding="utf-8")
    started_s = time.perf_counter()
    with _environment(note), (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        outcome = run_job(config, progress=log)
    whole_s = time.perf_counter() - started_s
    assert outcome.is_success, outcome.text
    rows = read_output(str(folder / name)).sort_by("id").to_pylist()
    noted = json.loads(note.read_text(encoding="utf-8"))
    return Pass(
        elapsed_s=_last_commit_s(folder / name) - noted["loaded_s"],
        step_s=noted["step_s"],
        whole_s=whole_s,
        num_tokens=sum(row["num_generated_tokens"] for row in rows),
        texts=[row["text"] for row in rows],
    )


def measure_engine(setup: Setup, *, folder: Path) -> Pass:
    """One pass of the bare engine, with the job's engine and sampling settings."""
    from dspark_batch.batch.templates import CompiledTemplate
    from dspark_batch.engine.engine import BatchEngine

    config = _config(setup, folder=folder, name="unused")
    template = CompiledTemplate(TEMPLATE)
    sampling = config.sampling_params()
    requests = [
        Request(id=str(row["id"]), messages=(Message("user", template.render(row)),), sampling=sampling)
        for row in benchmark_rows(setup.num_rows).to_pylist()
    ]
    started_s = time.perf_counter()
    with BatchEngine.from_config(config.engine_config()) as engine:
        loaded_s = time.perf_counter()
        results = list(engine.generate(requests))
        ended_s = time.perf_counter()
        step_s = engine.stats.total_s
    return Pass(
        elapsed_s=ended_s - loaded_s,
        step_s=step_s,
        whole_s=ended_s - started_s,
        num_tokens=sum(result.num_generated_tokens for result in results),
        texts=[result.text for result in results],
    )


def compare(setup: Setup, *, folder: Path) -> dict[str, Any]:
    """Passes of both sides in turns, each repeat beginning with the other; plain JSON values.

    slowdown: of the job in per cent of the bare engine's time, median over repeats; negative where the job was faster.
    """
    import pyarrow.parquet as pq

    pq.write_table(benchmark_rows(setup.num_rows), folder / "rows.parquet")
    jobs: list[Pass] = []
    engines: list[Pass] = []
    for repeat in range(setup.num_repeats):
        if repeat % 2:
            jobs.append(measure_job(setup, folder=folder, name=f"job{repeat}"))
        engines.append(measure_engine(setup, folder=folder))
        if not repeat % 2:
            jobs.append(measure_job(setup, folder=folder, name=f"job{repeat}"))
    slowdowns = [100 * (job.elapsed_s / engine.elapsed_s - 1) for job, engine in zip(jobs, engines, strict=True)]
    return {
        "setup": asdict(setup),
        "engine_tokens_per_s": [one.tokens_per_s for one in engines],
        "job_tokens_per_s": [one.tokens_per_s for one in jobs],
        "job_whole_s": [one.whole_s for one in jobs],
        "engine_outside_s": [one.elapsed_s - one.step_s for one in engines],
        "job_outside_s": [one.elapsed_s - one.step_s for one in jobs],
        "job_elapsed_s": [one.elapsed_s for one in jobs],
        "slowdowns": slowdowns,
        "slowdown": statistics.median(slowdowns),
        "texts_equal": all(one.texts == engines[0].texts for one in (*engines, *jobs)),
        "device": asdict(device_facts()),
        "versions": versions(),
    }


def format_result(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    engine, job = (statistics.median(result[name]) for name in ("engine_tokens_per_s", "job_tokens_per_s"))
    outside, elapsed = (statistics.median(result[name]) for name in ("job_outside_s", "job_elapsed_s"))
    each = ", ".join(f"{slowdown:+.1f}" for slowdown in result["slowdowns"])
    return "\n".join(
        [
            f"bare engine {engine:8.0f} tokens/s",
            f"table job   {job:8.0f} tokens/s, its time {result['slowdown']:+.1f} % (repeats: {each})",
            f"outside steps of the engine: {outside:.1f} s of the job's {elapsed:.0f}",
            f"table job with the start of Ray and of the model: {statistics.median(result['job_whole_s']):.0f} s",
            f"texts equal: {result['texts_equal']}",
        ]
    )


def command(
    rows: Rows = 2000,
    repeats: Repeats = 3,
    max_new_tokens: MaxNewTokens = 32,
    target: Target = DEFAULT_TARGET,
    drafter: Annotated[str, typer.Option(help="The same on both sides.")] = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """A table job on one Ray actor against the bare engine on the same rows, in turns."""
    setup = Setup(
        num_rows=rows,
        num_repeats=repeats,
        max_new_tokens=max_new_tokens,
        target=target,
        drafter=drafter,
        threads=threads,
    )
    with TemporaryDirectory(prefix="dspark-batch-bench-") as folder:
        result = compare(setup, folder=Path(folder))
    sys.stdout.write(format_result(result) + "\n")
    if as_json:
        write_json(result)


def _config(setup: Setup, *, folder: Path, name: str) -> JobConfig:
    from dspark_batch.job.loader import config_from_values

    return config_from_values(job_values(setup, folder=folder, name=name), source="benchmark")


@contextmanager
def _environment(note: Path) -> Iterator[None]:
    """The workers of a run that begins here write to ``note``."""
    from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE

    values = {ENGINE_FACTORY_VARIABLE: _FACTORY, NOTE_FILE_VARIABLE: str(note)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _last_commit_s(output: Path) -> float:
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "_dspark" / "manifest").iterdir()]
    return max(datetime.fromisoformat(entry["finished_at"]).timestamp() for entry in entries)


if __name__ == "__main__":
    sys.exit(run_module(command))
