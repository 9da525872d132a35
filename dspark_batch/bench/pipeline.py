"""Rows per second of everything around the engine: plan, read, render, feed, assemble, commit, resume, finish.

The engine is a stub that answers at once, so what is measured is the overhead per row. The run is stopped after half of
its shards and resumed. ``python -m dspark_batch.bench.pipeline --rows 200000``; the last line of its output is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.executor import WorkerSpec
    from dspark_batch.batch.planning import ResolvedPlan
    from dspark_batch.batch.shards import Shard
    from dspark_batch.job.config import JobConfig

ROWS_PER_FILE = 100_000
NUM_MEMORY_SAMPLES = 8
WORDS = "the quick brown fox jumps over a lazy dog while it rains in the hills "


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFigures:
    """What one run of the benchmark measured.

    Seconds: ``plan_s`` from nothing to the saved plan; ``resume_s`` from the half-finished output to the list of what
    is left; ``reopen_s`` the same for the finished output; ``finish_s`` the end of the run; ``run_s`` the wall time of
    both halves, without the start of their processes. ``cpu_us_per_row`` is the processor time of all workers, which
    other work on the machine hardly changes. ``num_shards_again`` counts shards that both halves made. ``worker_mib``
    is the memory of the largest worker at even steps through each half, libraries included; ``driver_mib`` that of the
    driver at its peak.
    """

    num_rows: int
    num_shards: int
    num_processes: int
    plan_s: float
    resume_s: float
    reopen_s: float
    finish_s: float
    run_s: float
    rows_per_s: float
    cpu_us_per_row: float
    num_shards_again: int
    worker_mib: tuple[tuple[float, ...], ...]
    driver_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worked:
    """What one worker process did. Times are of the clock that all processes share."""

    started_s: float
    ended_s: float
    cpu_s: float
    memory_mib: tuple[float, ...]
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """What all workers did in one half of the run."""

    run_s: float
    cpu_s: float
    memory_mib: tuple[float, ...]
    shards: frozenset[str]


def measure_pipeline(
    num_rows: int, *, folder: Path, rows_per_shard: int = 1024, temperature: float = 0.0, num_processes: int = 2
) -> PipelineFigures:
    """Write ``num_rows`` rows into Parquet files of ``folder`` and run a job over them in two halves."""
    from dspark_batch.batch.finish import finish_run
    from dspark_batch.batch.lease import acquire_lease

    write_input(folder / "in", num_rows)
    config = _config(folder, rows_per_shard=rows_per_shard, temperature=temperature)
    started_s = time.monotonic()
    run, resolved = _open(config)
    resolved.save(run)
    plan_s = time.monotonic() - started_s
    plan = resolved.plan
    with acquire_lease(run.store, run_id=run.run_id, on_conflict="fail") as lease:
        run.hold(lease)
        first = _run_half(plan.shards[: len(plan.shards) // 2], spec=_spec(config, run, resolved), num=num_processes)
        started_s = time.monotonic()
        run, resolved = _open(config)
        committed = run.committed()
        left = [shard for shard in resolved.plan.shards if shard.name not in committed]
        resume_s = time.monotonic() - started_s
        run.hold(lease)
        second = _run_half(left, spec=_spec(config, run, resolved), num=num_processes)
        started_s = time.monotonic()
        run, resolved = _open(config)
        assert len(run.committed()) == len(plan.shards), "a resumed run must find every shard"
        reopen_s = time.monotonic() - started_s
        run.hold(lease)
        finish_run(run, plan=resolved.plan, config=config)
        finish_s = time.monotonic() - started_s - reopen_s
    run_s = first.run_s + second.run_s
    return PipelineFigures(
        num_rows=num_rows,
        num_shards=len(plan.shards),
        num_processes=num_processes,
        plan_s=round(plan_s, 3),
        resume_s=round(resume_s, 3),
        reopen_s=round(reopen_s, 3),
        finish_s=round(finish_s, 3),
        run_s=round(run_s, 3),
        rows_per_s=round(num_rows / run_s, 1),
        cpu_us_per_row=round((first.cpu_s + second.cpu_s) / num_rows * 1e6, 2),
        num_shards_again=len(first.shards & second.shards),
        worker_mib=(first.memory_mib, second.memory_mib),
        driver_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def write_input(folder: Path, num_rows: int) -> None:
    """Parquet files of 100,000 rows with an id, a text of some dozen words and a number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for start in range(0, num_rows, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, num_rows))
        texts = [f"{WORDS * (1 + number % 4)}{number}" for number in numbers]
        table = pa.table({"id": [f"row-{number}" for number in numbers], "text": texts, "stars": numbers})
        pq.write_table(table, folder / f"{start:012d}.parquet", row_group_size=10_000)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the figures as one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m dspark_batch.bench.pipeline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--processes", type=int, default=2, help="workers, each with an engine of its own")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder; removed at the end")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder if chosen.folder is not None else Path(tempfile.mkdtemp(prefix="dspark-pipeline"))
    try:
        figures = measure_pipeline(
            chosen.rows,
            folder=folder / "run",
            rows_per_shard=chosen.rows_per_shard,
            temperature=chosen.temperature,
            num_processes=chosen.processes,
        )
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")


def _config(folder: Path, *, rows_per_shard: int, temperature: float) -> JobConfig:
    from dspark_batch.job.config import JobConfig

    return JobConfig.model_validate(
        {
            "input": {"path": str(folder / "in"), "id": "id"},
            "prompt": {"template": "Summarise in one sentence: {{ text }}", "system": "You are brief."},
            "sampling": {"temperature": temperature},
            "output": {"path": str(folder / "out")},
            "shards": {"rows": rows_per_shard},
            "ray": {"shards_in_flight": 3},
        }
    )


def _open(config: JobConfig) -> tuple[RunStore, ResolvedPlan]:
    """What a start of the run does before its first shard."""
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.fingerprint import fingerprint_fields
    from dspark_batch.batch.planning import resolve_plan

    def fields_of(digest: str | None) -> dict[str, object]:
        return fingerprint_fields(config, weights_fingerprint="stub", input_digest=digest)

    run = RunStore(config.output.path)
    resolved = resolve_plan(config, run=run, fields_of=fields_of)
    run.open(resolved.fields)
    return run, resolved


def _spec(config: JobConfig, run: RunStore, resolved: ResolvedPlan) -> WorkerSpec:
    from dspark_batch.batch.executor import WorkerSpec
    from dspark_batch.testing.instant_engine import FACTORY

    return WorkerSpec(
        config=config,
        plan_schema=resolved.plan.schema,
        fingerprint=run.ticket.fingerprint,
        run_id=run.run_id,
        engine_factory=FACTORY,
        ticket=run.ticket,
    )


def _run_half(shards: Sequence[Shard], *, spec: WorkerSpec, num: int) -> _Half:
    """Each of ``num`` processes takes a stretch of the shards, as the actors of a pool do."""
    stretches = [shards[len(shards) * place // num : len(shards) * (place + 1) // num] for place in range(num)]
    with ProcessPoolExecutor(num, mp_context=multiprocessing.get_context("spawn")) as pool:
        worked = [future.result() for future in [pool.submit(_work, spec, stretch) for stretch in stretches]]
    return _Half(
        run_s=max(one.ended_s for one in worked) - min(one.started_s for one in worked),
        cpu_s=sum(one.cpu_s for one in worked),
        memory_mib=tuple(max(sizes) for sizes in zip(*(one.memory_mib for one in worked), strict=False)),
        shards=frozenset(name for one in worked for name in one.shards),
    )


def _work(spec: WorkerSpec, shards: Sequence[Shard]) -> _Worked:
    """The work of one process, as an actor or the local backend does it."""
    from dspark_batch.batch.executor import ShardExecutor
    from dspark_batch.job.local import LocalBackend

    names: list[str] = []
    memory_mib: list[float] = []
    with ShardExecutor(spec) as executor:
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        in_flight = spec.config.shards_in_flight(num_shards=len(shards))
        for entry in LocalBackend(executor.run, live=executor.live, shards_in_flight=in_flight).run(shards):
            if entry is None:
                continue
            names.append(entry.shard)
            if len(names) * NUM_MEMORY_SAMPLES >= len(shards) * (len(memory_mib) + 1):
                memory_mib.append(_memory_mib())
        ended_s, cpu_s = time.monotonic(), time.process_time() - started_cpu_s
    return _Worked(started_s=started_s, ended_s=ended_s, cpu_s=cpu_s, memory_mib=tuple(memory_mib), shards=tuple(names))


def _memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


if __name__ == "__main__":
    main()
