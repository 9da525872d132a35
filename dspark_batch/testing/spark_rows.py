"""Rows for the Spark tests, and what the local backend makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROWS = 101
TEMPLATE = "Summarise: {{ body }}"
SCHEMA = "review_id long, body string, stars int"


def review_rows(num_rows: int = NUM_ROWS) -> list[tuple[int, str | None, int]]:
    """(review_id, body, stars); every 17th body is NULL, every 10th equals another."""
    return [
        (1000 + row, None if row % 17 == 16 else f"review number {row - row % 10 // 9}", row % 5)
        for row in range(num_rows)
    ]


def job_values(target: Path, **sampling: Any) -> dict[str, Any]:
    """A config for DataFrame calls, on the engine that ``target`` stands for.

    In float32: in bfloat16 a near tie may fall otherwise where a draft was verified.
    """
    return {
        "model": {"target": str(target), "dtype": "float32"},
        "sampling": {"max_new_tokens": 7, **sampling},
        "output": {"column": "text"},
    }


def local_texts(folder: Path, *, target: Path, **sampling: Any) -> dict[int, str | None]:
    """Text by review id, as a job of the local backend over the same rows writes it."""
    from dspark_batch.batch.commit import read_output
    from dspark_batch.job.runner import run_job

    columns = list(zip(*review_rows(), strict=True))
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"review_id": columns[0], "body": columns[1], "stars": columns[2]}), folder / "in.parquet")
    values = {
        **job_values(target, **sampling),
        "input": {"path": str(folder / "in.parquet"), "id": "review_id"},
        "prompt": {"template": TEMPLATE},
        "output": {"path": str(folder / "out"), "column": "text"},
        "engine": {"backend": "local"},
        "shards": {"rows": 13},
        "limits": {"max_failed_fraction": 1.0},
    }
    run_job(values)
    table = read_output(str(folder / "out"))
    return {row["review_id"]: row["text"] for row in table.select(["review_id", "text"]).to_pylist()}
