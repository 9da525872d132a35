"""A small job on disk for whole-pipeline tests, with an engine that needs no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SCRIPTED = "dspark_batch.testing.engine_factories:scripted"


@dataclass(slots=True)
class Job:
    """A config file with its input and output; ``config`` can be changed before each ``write``."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self) -> str:
        """Write the config; the path as the command line takes it."""
        self.path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        return str(self.path)

    def parts(self) -> dict[str, tuple[int, bytes]]:
        """Inode and bytes of every shard file."""
        return {file.name: (file.stat().st_ino, file.read_bytes()) for file in sorted(self.out.glob("*.parquet"))}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        lines = (self.out / "_dspark" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def reviews(num_rows: int) -> pa.Table:
    """Rows with distinct ids and prompts."""
    numbers = range(num_rows)
    return pa.table({"id": [f"r{n}" for n in numbers], "text": [f"text {n}" for n in numbers], "stars": list(numbers)})


def write_job(folder: Path, table: pa.Table, *, rows_per_shard: int = 7) -> Job:
    """The table as Parquet with several row groups, and a job over it with ``backend: local``."""
    pq.write_table(table, folder / "in.parquet", row_group_size=13)
    job = Job(folder)
    job.config = {
        "input": {"path": str(folder / "in.parquet"), "id": "id"},
        "prompt": {"template": "Say {{ text }}"},
        "output": {"path": str(job.out), "column": "answer"},
        "engine": {"backend": "local"},
        "sampling": {"temperature": 0.7},
        "shards": {"rows": rows_per_shard},
        "ray": {"shards_in_flight": 2},
    }
    return job
