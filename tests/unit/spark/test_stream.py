from __future__ import annotations

import random
from concurrent.futures import Future

import pyarrow as pa
import pytest

from dspark_batch.job.config import JobConfig
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk
from dspark_batch.spark.stream import HELD_FACTOR, Work, stream

JOB = JobConfig(input={"path": "x"}, prompt={"template": "{{ a }}"}, output={"path": "y"})  # type: ignore[arg-type]


class ManualClient:
    """Finishes chunks when told to, in any order; ``submit`` finishes some by itself, as an engine meanwhile would."""

    def __init__(self, *, max_concurrency: int, seed: int, finish_first: bool = True) -> None:
        self.max_concurrency = max_concurrency
        self.open: list[tuple[Chunk, Future[pa.Table]]] = []
        self.most_open_rows = 0
        self.released: list[Future[pa.Table]] = []
        self._chance = random.Random(seed)
        self._finish_first = finish_first
        self.num_submitted = 0

    def submit(self, chunk: Chunk) -> Future[pa.Table]:
        self.num_submitted += 1
        self.open.append((chunk, Future()))
        future = self.open[-1][1]
        rows = sum(chunk.num_rows for chunk, _ in self.open)
        self.most_open_rows = max(self.most_open_rows, rows)
        while len(self.open) > 2:
            self.finish(self._chance.randrange(0 if self._finish_first else 1, len(self.open)))
        return future

    def finish(self, place: int) -> None:
        chunk, future = self.open.pop(place)
        future.set_result(chunk.table)

    def release(self, futures) -> None:
        self.released += futures

    def close(self) -> None: ...


def work(first: int, num_rows: int) -> Work[int]:
    ids = [str(first + row) for row in range(num_rows)]
    return Work(Chunk(job=JOB, table=pa.table({ROW_ID_COLUMN: ids})), first)


def ragged(seed: int, num_chunks: int) -> list[Work[int]]:
    chance = random.Random(seed)
    works, first = [], 0
    for _ in range(num_chunks):
        num_rows = chance.choice([1, 2, 3, 5, 7])
        works.append(work(first, num_rows))
        first += num_rows
    return works


@pytest.mark.parametrize("seed", range(6))
def test_chunks_come_back_in_order_whatever_finishes_first(seed: int) -> None:
    works = ragged(seed, 23)
    client = FinishingClient(max_concurrency=2, seed=seed)
    out = list(stream(iter(works), client))
    assert [kept for kept, _ in out] == [one.kept for one in works]
    assert all(table.equals(one.chunk.table) for (_, table), one in zip(out, works, strict=True))


class FinishingClient(ManualClient):
    """Finishes everything before long, so that a waiting stream always goes on."""

    def submit(self, chunk: Chunk) -> Future[pa.Table]:
        future = super().submit(chunk)
        if self._chance.random() < 0.5 or self.num_submitted >= 22:
            while self.open:
                self.finish(self._chance.randrange(len(self.open)))
        return future


def test_a_slow_first_chunk_does_not_stop_the_rest_but_bounds_what_waits_for_it() -> None:
    works = [work(number, 1) for number in range(10_000)]
    client = ManualClient(max_concurrency=2, seed=1, finish_first=False)
    source = iter(works)
    results = stream(source, client)

    class StopHereError(Exception): ...

    def wait_forever(*_: object, **__: object) -> None:
        raise StopHereError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_batch.spark.stream.wait", wait_forever)
        with pytest.raises(StopHereError):
            next(results)
    assert client.num_submitted == HELD_FACTOR * 2
    assert client.most_open_rows <= 4


def test_a_consumer_that_stops_early_releases_what_is_pending() -> None:
    client = FinishingClient(max_concurrency=4, seed=3)
    results = stream(iter(ragged(3, 22)), client)
    next(results)
    results.close()
    assert all(isinstance(future, Future) for future in client.released)
    assert client.num_submitted < 23


def test_an_error_of_a_chunk_reaches_the_consumer() -> None:
    class Failing(ManualClient):
        def submit(self, chunk: Chunk) -> Future[pa.Table]:
            future: Future[pa.Table] = Future()
            future.set_exception(RuntimeError("engine gone"))
            return future

    with pytest.raises(RuntimeError, match="engine gone"):
        list(stream(iter(ragged(1, 2)), Failing(max_concurrency=1, seed=0)))
