"""Rows of a pilot: drawn from everywhere, the same each time; and the steps of its engine on a clock."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.pilot import MOST_DRAWN, TimedEngine, TimedStep, draw_rows
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.shards import cut_files
from dspark_batch.batch.sources import find_input_files
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.core import FinishReason, Request, Result
from dspark_batch.job.forecast import Pilot, estimate_of
from dspark_batch.metrics import EngineStats, StepRecord
from dspark_batch.testing.scripted_engine import ScriptedEngine

NUM_ROWS = 60


@pytest.fixture
def draw(make_config, tmp_path):
    """Draws from two files of 20 and 40 rows, in shards of 7."""
    (tmp_path / "in").mkdir()
    rows = range(NUM_ROWS)
    table = pa.table({"n": rows, "third": [n % 3 for n in rows], "text": [f"t{n}" for n in rows]})
    pq.write_table(table.slice(0, 20), tmp_path / "in" / "a.parquet", row_group_size=5)
    pq.write_table(table.slice(20), tmp_path / "in" / "b.parquet", row_group_size=5)

    def drawn(num_rows: int, *, seed: int = 0, **section):
        config = make_config(input=section)
        plan = cut_files(find_input_files(config.input), max_rows=7, filter=config.input.filter)
        reader = ShardReader(config, plan_schema=plan.schema)
        try:
            return draw_rows(plan, reader, id_column=config.input.id, num_rows=num_rows, seed=seed)
        finally:
            reader.close()

    return drawn


def numbers(drawn) -> list[int]:
    return drawn.table.column("n").to_pylist()


def test_rows_come_from_the_whole_input_each_with_the_same_chance(draw) -> None:
    counts = Counter(n for seed in range(300) for n in numbers(draw(6, seed=seed)))
    assert set(counts) == set(range(NUM_ROWS))
    assert sum((count - 30) ** 2 / 30 for count in counts.values()) < 100  # chi-square of 59 degrees, 0.9994
    assert numbers(draw(6, seed=3)) == numbers(draw(6, seed=3))


def test_any_part_of_the_draw_is_a_draw_itself(draw) -> None:
    firsts = Counter(numbers(draw(6, seed=seed))[0] // 10 for seed in range(300))
    assert all(25 < firsts[tenth] < 80 for tenth in range(6)), firsts


def test_rows_have_the_ids_that_they_have_in_the_job(draw) -> None:
    drawn = draw(12)
    assert drawn.ids == tuple(f"a.parquet#{n}" if n < 20 else f"b.parquet#{n - 20}" for n in numbers(drawn))
    named = draw(12, id="text")
    assert named.ids == tuple(named.table.column("text").to_pylist())
    assert named.rows(2, 5).ids == named.ids[2:5]
    assert named.rows(2, 5).table.equals(named.table.slice(2, 3))


def test_more_rows_than_there_are_give_each_once(draw) -> None:
    drawn = draw(1000)
    assert sorted(numbers(drawn)) == list(range(NUM_ROWS))
    assert (drawn.num_drawn, drawn.num_passing) == (NUM_ROWS, NUM_ROWS)


def test_a_filter_is_passed_by_all_and_its_share_is_known(draw) -> None:
    found = [draw(4, seed=seed, filter="third == 1") for seed in range(60)]
    assert all(len(drawn.ids) == 4 and drawn.num_passing >= 4 for drawn in found)
    assert {n for drawn in found for n in numbers(drawn)} == set(range(1, NUM_ROWS, 3))
    share = sum(drawn.num_passing for drawn in found) / sum(drawn.num_drawn for drawn in found)
    assert share == pytest.approx(1 / 3, abs=0.03)


def test_what_the_plan_leaves_out_is_not_drawn(draw) -> None:
    drawn = draw(100, filter="n >= 20")
    assert (drawn.num_drawn, drawn.num_passing) == (40, 40)


def test_looking_for_rows_that_pass_has_an_end(draw, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(draw(3, filter="text == 't7' or text == 't31'").ids) == 2
    none = draw(3, filter="third > 0 and third < 1")
    assert (none.ids, none.num_passing, none.num_drawn) == ((), 0, min(NUM_ROWS, 3 * MOST_DRAWN))
    monkeypatch.setattr("dspark_batch.batch.pilot.MOST_DRAWN", 4)
    assert draw(3, filter="third > 0 and third < 1").num_drawn == 12


class Clock:
    """A second later each time it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_steps_are_timed_from_the_end_of_the_one_before() -> None:
    clock = Clock()
    engine = TimedEngine(ScriptedEngine(max_concurrency=3, max_steps=1), clock=clock)
    for n in range(5):
        engine.add(Request(id=str(n), prompt=f"p{n}"))
    clock.now_s += 100
    engine.begin()
    clock.now_s += 10
    engine.step()
    engine.step()
    first, second = engine.steps
    assert (first.seconds, first.num_running) == (11.0, 3)
    assert (second.seconds, second.num_running, second.has_queue) == (1.0, 2, False)
    engine.begin()
    assert engine.steps == []


class MeasuredEngine(ScriptedEngine):
    """Says in its statistics that each step computes seven prompt tokens beside its rows."""

    def __init__(self) -> None:
        super().__init__(max_concurrency=2, max_steps=1)
        self.stats = EngineStats()

    def step(self):
        num_queued = max(0, self.num_unfinished - 2)
        out = super().step()
        self.stats.add(StepRecord(num_rows=len(out), num_prefill_tokens=7, num_queued=num_queued))
        return out


def test_what_an_engine_counts_is_known_by_step() -> None:
    engine = TimedEngine(MeasuredEngine(), clock=Clock())
    for n in range(3):
        engine.add(Request(id=str(n), prompt=f"p{n}"))
    engine.step()
    engine.step()
    assert engine.steps == [
        TimedStep(seconds=1.0, num_running=2, num_rounds=2, num_prompt_tokens=7, has_queue=True),
        TimedStep(seconds=1.0, num_running=1, num_rounds=1, num_prompt_tokens=7, has_queue=False),
    ]


class CostedEngine:
    """Decodes as a real engine does, on a clock of its own: prompts in chunks beside rows, at made-up costs.

    A prompt of ``"<tokens> <output>"`` has so many tokens and gives so many.
    """

    has_chat_template = False
    max_concurrency = 16
    chunk_tokens = 256

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.now_s = 0.0
        self._waiting: deque[list[Any]] = deque()
        self._running: list[list[Any]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> int:
        assert request.prompt is not None
        num_prompt, num_output = map(int, request.prompt.split())
        self._waiting.append([request, num_prompt, num_output])
        return id(request)

    def step(self) -> list[tuple[int, Result]]:
        while self._waiting and len(self._running) < self.max_concurrency:
            self._running.append(self._waiting.popleft())
        num_decoding, room = 0, self.chunk_tokens
        for row in self._running:
            taken = min(row[1], room)
            num_decoding += row[1] == 0
            row[1], room = row[1] - taken, room - taken
            row[2] -= row[1] == 0
        num_prompt_tokens = self.chunk_tokens - room
        self.now_s += 0.010 + 0.002 * num_decoding + 0.0005 * num_prompt_tokens
        done = [row for row in self._running if row[2] == 0]
        self._running = [row for row in self._running if row[2] > 0]
        self.stats.add(
            StepRecord(num_rows=num_decoding, num_prefill_tokens=num_prompt_tokens, num_queued=len(self._waiting))
        )
        return [(id(row[0]), _result_of(row[0])) for row in done]

    def close(self) -> None:
        return


def _result_of(request: Request) -> Result:
    assert request.prompt is not None
    num_prompt, num_output = map(int, request.prompt.split())
    return Result(
        id=request.id,
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=num_prompt,
        num_generated_tokens=num_output,
        num_rounds=num_output - 1,
    )


@pytest.mark.parametrize(("mean_prompt", "mean_output"), [(60, 40), (400, 8), (30, 120), (80, 1)])
def test_the_time_of_a_long_job_is_foretold_by_a_short_pilot(make_config, mean_prompt: int, mean_output: int) -> None:
    chance = random.Random(mean_prompt)
    lengths = [
        (
            1 + int(chance.gammavariate(4, mean_prompt / 4)),
            1 + int(chance.gammavariate(2, (mean_output - 1) / 2 or 1e-9)),
        )
        for _ in range(600)
    ]
    config = make_config(prompt={"template": "{{ text }}"}, input={"columns": []}, sampling={"temperature": 1.0})

    def decoded(rows: list[tuple[int, int]]) -> tuple[Pilot, float]:
        table = pa.table({"text": [f"{prompt} {output}" for prompt, output in rows]})
        inner = CostedEngine()
        engine = TimedEngine(inner, clock=lambda: inner.now_s)
        worker = BatchWorker(engine, config=config, input_schema=table.schema)
        ids = tuple(map(str, range(len(rows))))
        result = next(iter(worker.run_shards([ShardInput(key="pilot", table=table, ids=ids)])))
        pilot = Pilot(
            num_input_rows=600,
            num_drawn=len(rows),
            num_passing=len(rows),
            prompt_tokens=[prompt for prompt, _ in rows],
            generated_tokens=[output for _, output in rows],
            num_rounds=result.table.column("num_rounds").to_pylist(),
            steps=engine.steps,
        )
        return pilot, inner.now_s

    _, true_s = decoded(lengths)
    pilots = [decoded(chance.sample(lengths, 32))[0] for _ in range(16)]
    found = [estimate_of(pilot, num_engines=1, load_s=0.0).time_s for pilot in pilots]
    assert sum(interval.value for interval in found) / 16 == pytest.approx(true_s, rel=0.05)
    assert sum(interval.low <= true_s <= interval.high for interval in found) >= 12
