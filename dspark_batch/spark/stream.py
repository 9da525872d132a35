"""Keeps one engine filled from the batches of a partition, and gives the finished chunks back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa

from dspark_batch.spark.client import Chunk, EngineClient

OPEN_FACTOR = 8
"""Rows in chunks that are not finished, as a multiple of the engine's concurrency: while the last rows of some chunks
decode, others fill the batch."""

MIN_OPEN_CHUNKS = 2

HELD_FACTOR = 64
"""Finished rows that may wait for an earlier one that takes longer, in multiples of the engine's concurrency."""

_Kept = TypeVar("_Kept")


@dataclass(frozen=True, slots=True)
class Work(Generic[_Kept]):
    """A chunk for the engine and what the caller wants back beside its result."""

    chunk: Chunk
    kept: _Kept


def stream(source: Iterable[Work[_Kept]], client: EngineClient) -> Iterator[tuple[_Kept, pa.Table]]:
    """Generate every chunk of the source; (what was kept, the added columns) in the order of the source.

    The source is read ahead so far that the engine never waits for rows, across the batches that Spark cuts, and no
    further. When the caller stops early the rest is released. Raises what the engine raises.
    """
    pending: deque[tuple[Work[_Kept], Future[pa.Table]]] = deque()
    chunks = iter(source)
    has_more = True
    try:
        while has_more or pending:
            while has_more and _has_room(pending, client.max_concurrency):
                work = next(chunks, None)
                has_more = work is not None
                if work is not None:
                    pending.append((work, client.submit(work.chunk)))
            while pending and pending[0][1].done():
                work, future = pending.popleft()
                yield work.kept, future.result()
            unfinished = [future for _, future in pending if not future.done()]
            if unfinished and not (has_more and _has_room(pending, client.max_concurrency)):
                wait(unfinished, return_when=FIRST_COMPLETED)
    finally:
        client.release([future for _, future in pending])


def _has_room(pending: deque[tuple[Work[_Kept], Future[pa.Table]]], concurrency: int) -> bool:
    open_rows = [work.chunk.num_rows for work, future in pending if not future.done()]
    if len(open_rows) < MIN_OPEN_CHUNKS:
        return True
    num_held = sum(work.chunk.num_rows for work, _ in pending)
    return sum(open_rows) < OPEN_FACTOR * concurrency and num_held < HELD_FACTOR * concurrency
