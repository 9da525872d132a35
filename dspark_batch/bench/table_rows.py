"""The table that benchmarks of whole jobs run over: distinct short reviews, as many as wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

TEMPLATE = "Write one sentence in answer to this review: {{ body }}"
_TOPICS = ("a kettle", "running shoes", "a desk lamp", "headphones", "a backpack", "a frying pan", "a phone case")
_COMPLAINTS = ("arrived late", "broke after a week", "is louder than expected", "is lovely", "does what it should")


def benchmark_rows(num_rows: int, *, first: int = 0) -> pa.Table:
    """Columns id and body, the same every time; ids count from ``first``."""
    import pyarrow as pa

    rows = range(first, first + num_rows)
    bodies = [
        f"Order {row}: I bought {_TOPICS[row % len(_TOPICS)]} and it {_COMPLAINTS[row % len(_COMPLAINTS)]}."
        for row in rows
    ]
    return pa.table({"id": pa.array(rows, pa.int64()), "body": bodies})
