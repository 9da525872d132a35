"""A small job on a Ray cluster that may be killed at any time, and the audit of what stands in its table afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.batch.layout import META, STAGING
from dspark_batch.testing.jobs import SCRIPTED
from dspark_batch.testing.kill_driver import Command, DriverProcess
from dspark_batch.testing.table_outputs import TableOutput, rows_of

Sink = Literal["parquet", "delta", "iceberg"]
Engine = Literal["scripted", "model", "missing"]
Rows = list[dict[str, Any]]

FACTORIES: dict[Engine, str] = {"scripted": SCRIPTED, "missing": "dspark_batch.testing.engine_factories:missing"}
"""Engines of tests by name; ``model`` is the real one, with the embedded model."""
SINKS: tuple[Sink, ...] = ("parquet", "delta", "iceberg")
NUM_SHARDS = 12
ROWS_PER_SHARD = 3
NUM_ROWS = NUM_SHARDS * ROWS_PER_SHARD
STEP_DELAY_S = 0.08
"""Of the scripted engine: a shard takes about a quarter of a second."""

DRAFT_COUNTS = ("num_rounds", "num_drafted_tokens", "num_accepted_tokens")
"""Columns that say how the model's tokens came about and not which they are; they move with the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a finished run left, compared with an undisturbed one. All counts but ``num_rows`` and strays must be 0.

    ``num_stray_files``: files without a commit that lie about, staged ones included. ``num_strays_counted``: those that
    a reader of the table takes for data.
    """

    num_rows: int
    num_lost: int
    num_duplicated: int
    num_changed: int
    num_stray_files: int
    num_strays_counted: int

    @property
    def is_clean(self) -> bool:
        return not (self.num_lost or self.num_duplicated or self.num_changed or self.num_strays_counted)


@dataclass(slots=True)
class KillJob:
    """The job's files, and the commands that were given for it, the last one last."""

    output: TableOutput
    engine: Engine
    config_path: Path
    commands: list[Command] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.output.folder

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def command(self) -> Command:
        return self.commands[-1]

    @property
    def num_commits(self) -> int:
        """Shards that are committed now."""
        folder = self.out / META / "manifest"
        return sum(name.endswith(".json") for name in os.listdir(folder)) if folder.is_dir() else 0

    @property
    def is_complete(self) -> bool:
        return (self.out / "_SUCCESS").exists()

    def start(self, driver: DriverProcess, *overrides: str) -> Command:
        """Have a driver run the job; its output goes to a log in the folder."""
        arguments = ["run", str(self.config_path), *overrides]
        environment = {ENGINE_FACTORY_VARIABLE: FACTORIES.get(self.engine, "")}
        log = self.folder / f"driver{len(self.commands)}.log"
        self.commands.append(driver.run(arguments, environment=environment, log=log))
        return self.command

    def last_log(self) -> str:
        """The end of what the last driver wrote."""
        return self.command.output()[-2000:] if self.commands else ""

    def last_words(self) -> tuple[str, ...]:
        """The last line that each driver wrote."""
        logs = [command.output().split("\n") for command in self.commands]
        return tuple(next((line.strip() for line in reversed(lines) if line.strip()), "") for lines in logs)

    def audit(self, expected: Rows) -> Audit:
        """Compare the table, as its format's reader sees it, with the rows of an undisturbed run."""
        seen = self.output.files()
        run = RunStore(str(self.out), format=self.output.config().output.format).join("")
        committed = {f"{self.out}/{run.ticket.file_name(entry.file)}" for entry in run.committed().values()}
        data = [self.out / name for name in run.store.files(run.ticket.data) if name.endswith(".parquet")]
        staged = run.store.files(STAGING)
        return compare_rows(
            expected,
            self.output.read(),
            ignored=DRAFT_COUNTS if self.engine == "model" else (),
            num_stray_files=len({str(file) for file in data} - committed) + len(staged),
            num_strays_counted=len(seen - committed),
        )


def compare_rows(
    expected: Rows, found: Rows, *, ignored: Sequence[str] = (), num_stray_files: int = 0, num_strays_counted: int = 0
) -> Audit:
    """Count rows by ``id``: missing, more than once, or with another value in a column that is not ignored."""
    copies = Counter(row["id"] for row in found)
    by_id = {row["id"]: _without(row, ignored) for row in expected}
    return Audit(
        num_rows=len(found),
        num_lost=len(by_id.keys() - copies.keys()),
        num_duplicated=sum(copies.values()) - len(copies) + len(copies.keys() - by_id.keys()),
        num_changed=sum(row["id"] in by_id and by_id[row["id"]] != _without(row, ignored) for row in found),
        num_stray_files=num_stray_files,
        num_strays_counted=num_strays_counted,
    )


def make_kill_job(folder: Path, *, sink: Sink, engine: Engine, address: str, num_actors: int = 1) -> KillJob:
    """Write input and config of a job of ``NUM_SHARDS`` shards that joins the cluster at ``address``."""
    folder = folder.resolve()
    output = TableOutput(folder, sink)
    output.write_input("rows.parquet", rows_of(0, NUM_ROWS))
    (folder / "w").mkdir()
    sections: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "in" / "rows.parquet")},
        "sampling": {"temperature": 0.7, "max_new_tokens": 16},
        "shards": {"rows": ROWS_PER_SHARD},
        "engine": {"backend": "ray"},
        "ray": {"address": address, "actors": num_actors, "shards_in_flight": 2},
    }
    if engine == "model":
        sections["model"] = {"dtype": "float32"}
        sections["engine"] |= {"max_concurrency": 4, "max_context": 512, "kv_cache_gib": 0.25}
        sections["output"] = {"token_ids": True}
    path = folder / "job.yaml"
    values = output.config(**sections).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return KillJob(output=output, engine=engine, config_path=path)


def undisturbed_rows(folder: Path, *, engine: Engine) -> Rows:
    """The rows of the same job without Ray and without kills."""
    job = make_kill_job(folder, sink="parquet", engine=engine, address="none")
    environment = {**os.environ, ENGINE_FACTORY_VARIABLE: FACTORIES.get(engine, "")}
    command = [sys.executable, "-m", "dspark_batch.cli", "run", str(job.config_path), "engine.backend=local"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"the undisturbed run ended with {done.returncode}:\n{done.stderr}"
    rows = job.output.read()
    assert len(rows) == NUM_ROWS, len(rows)
    return rows


def _without(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
