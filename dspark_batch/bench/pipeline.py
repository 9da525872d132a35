"""Rows per second of everything around the engine: plan, read, render, feed, assemble, commit, resume.

The engine is a stub that answers at once, so what is measured is the overhead per row. Run it with
``python -m dspark_batch.bench.pipeline --rows 200000``; the last line of its output is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.core import FinishReason, Request, Result

if TYPE_CHECKING:
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.job.config import JobConfig

ROWS_PER_FILE = 100_000
NUM_COMMITTERS = 2
WORDS = "the quick brown fox jumps over a lazy dog while it rains in the hills "


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFigures:
    """What one run of the benchmark measured. Memory is the peak of the whole process, its libraries included.

    ``rows_per_cpu_s`` is over the processor time of this process, which a busy machine does not change.
    """

    num_rows: int
    num_shards: int
    plan_s: float
    run_s: float
    resume_s: float
    run_cpu_s: float
    rows_per_s: float
    rows_per_cpu_s: float
    start_mib: float
    half_mib: float
    peak_mib: float


class InstantEngine:
    """A ``RowEngine`` that finishes every row in the step after it was added."""

    has_chat_template = False
    max_concurrency = 256

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Request]] = deque()
        self._num_requests = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> int:
        self._num_requests += 1
        self._waiting.append((self._num_requests, request))
        return self._num_requests

    def step(self) -> list[tuple[int, Result]]:
        done = [(ticket, _result(request)) for ticket, request in self._waiting]
        self._waiting.clear()
        return done

    def close(self) -> None:
        return


def measure_pipeline(
    num_rows: int, *, folder: Path, rows_per_shard: int = 1024, temperature: float = 0.0
) -> PipelineFigures:
    """Write ``num_rows`` rows into Parquet files of ``folder`` and run a job over them. Takes no lease."""
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.fingerprint import fingerprint_fields
    from dspark_batch.batch.finish import finish_run
    from dspark_batch.batch.planning import resolve_plan
    from dspark_batch.batch.reader import ShardReader
    from dspark_batch.batch.worker import BatchWorker

    _write_input(folder / "in", num_rows)
    config = _config(folder, rows_per_shard=rows_per_shard, temperature=temperature)

    def fields_of(digest: str | None) -> dict[str, object]:
        return fingerprint_fields(config, weights_fingerprint="stub", input_digest=digest)

    start_mib = _peak_mib()
    started_s = time.perf_counter()
    run = RunStore(config.output.path)
    resolved = resolve_plan(config, run=run, fields_of=fields_of)
    run.open(resolved.fields)
    resolved.save(run)
    plan_s = time.perf_counter() - started_s
    shards = resolved.plan.shards

    reader = ShardReader(config, plan_schema=resolved.plan.schema)
    worker = BatchWorker(InstantEngine(), config=config, input_schema=reader.schema)
    half_mib = start_mib
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(NUM_COMMITTERS) as committers:
        commits: deque[Future[ManifestEntry]] = deque()
        for number, finished in enumerate(worker.run_shards(reader.read(shard) for shard in shards)):
            commits.append(committers.submit(run.commit, finished))
            while len(commits) > 2 * NUM_COMMITTERS:
                commits.popleft().result()
            if number == len(shards) // 2:
                half_mib = _peak_mib()
        for commit in commits:
            commit.result()
    run_s, run_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    reader.close()

    started_s = time.perf_counter()
    again = RunStore(config.output.path)
    resumed = resolve_plan(config, run=again, fields_of=fields_of)
    again.open(resumed.fields)
    assert len(again.committed()) == len(shards), "a resumed run must find every shard"
    resume_s = time.perf_counter() - started_s
    finish_run(again, plan=resumed.plan, config=config)
    return PipelineFigures(
        num_rows=num_rows,
        num_shards=len(shards),
        plan_s=round(plan_s, 3),
        run_s=round(run_s, 3),
        resume_s=round(resume_s, 3),
        run_cpu_s=round(run_cpu_s, 3),
        rows_per_s=round(num_rows / run_s, 1),
        rows_per_cpu_s=round(num_rows / run_cpu_s, 1),
        start_mib=round(start_mib, 1),
        half_mib=round(half_mib, 1),
        peak_mib=round(_peak_mib(), 1),
    )


def _result(request: Request) -> Result:
    return Result(
        id=request.id,
        text="a short answer",
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=20,
        num_generated_tokens=3,
        num_rounds=2,
        num_drafted_tokens=2,
        num_accepted_tokens=1,
    )


def _config(folder: Path, *, rows_per_shard: int, temperature: float) -> JobConfig:
    from dspark_batch.job.config import JobConfig

    return JobConfig.model_validate(
        {
            "input": {"path": str(folder / "in"), "id": "id"},
            "prompt": {"template": "Summarise in one sentence: {{ text }}", "system": "You are brief."},
            "sampling": {"temperature": temperature},
            "output": {"path": str(folder / "out")},
            "shards": {"rows": rows_per_shard},
        }
    )


def _write_input(folder: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for start in range(0, num_rows, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, num_rows))
        texts = [f"{WORDS * (1 + number % 4)}{number}" for number in numbers]
        table = pa.table({"id": [f"row-{number}" for number in numbers], "text": texts, "stars": numbers})
        pq.write_table(table, folder / f"{start:012d}.parquet", row_group_size=10_000)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder, removed at the end")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder if chosen.folder is not None else Path(temporary)
        figures = measure_pipeline(
            chosen.rows, folder=folder, rows_per_shard=chosen.rows_per_shard, temperature=chosen.temperature
        )
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")


if __name__ == "__main__":
    main()
