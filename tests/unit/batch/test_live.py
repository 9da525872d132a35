"""Counting what comes out of an engine."""

from __future__ import annotations

from dspark_batch.batch.live import CountingEngine, EngineLoad, LiveCounts
from dspark_batch.core import ErrorCode, Request, SamplingParams
from dspark_batch.metrics import EngineStats, StepRecord
from dspark_batch.testing.scripted_engine import ScriptedEngine, scripted_result


def test_a_counting_engine_is_the_engine_and_counts_every_sample() -> None:
    inner = ScriptedEngine(max_concurrency=3, failures={"p4": ErrorCode.ENGINE_ERROR})
    engine = CountingEngine(inner)
    assert (engine.max_concurrency, engine.has_chat_template) == (3, False)
    requests = [Request(id=str(n), prompt=f"p{n}", sampling=SamplingParams(n=2)) for n in range(7)]
    tickets = [engine.add(request) for request in requests]
    assert len(set(tickets)) == 7
    seen = []
    while engine.num_unfinished:
        seen += [result for _, result in engine.step()]
    good = [scripted_result(request, sample=s) for request in requests if request.prompt != "p4" for s in (0, 1)]
    num_tokens = sum(result.num_generated_tokens for result in good)
    assert engine.counts == LiveCounts(
        num_samples=14,
        num_failed_samples=2,
        num_generated_tokens=num_tokens,
        num_rounds=num_tokens,
        num_drafted_tokens=2 * num_tokens,
        num_accepted_tokens=num_tokens,
        num_steps=inner.counters.num_steps,
        num_prefill_tokens=sum(result.num_prompt_tokens for result in seen),
        num_verified_tokens=2 * num_tokens,
    )
    assert (engine.by_position, engine.device) == ([], None)
    assert engine.counts - engine.counts == LiveCounts()
    assert len(seen) == 14
    engine.close()
    assert inner.is_closed


def test_the_load_of_an_engine_is_what_decodes_and_what_waits() -> None:
    engine = CountingEngine(ScriptedEngine(max_concurrency=3, max_steps=1))
    assert engine.load == EngineLoad()
    for n in range(5):
        engine.add(Request(id=str(n), prompt=f"p{n}"))
    assert engine.load == EngineLoad(num_running=3, num_queued=2)
    engine.step()
    assert engine.load == EngineLoad(num_running=2)
    assert engine.num_processed == 1


class MeasuredEngine(ScriptedEngine):
    """Counts a token per sample and step, as the real engine does while samples decode."""

    def __init__(self) -> None:
        super().__init__(max_concurrency=4, max_steps=9)
        self.stats = EngineStats()
        self.device = "cuda"

    def step(self):
        out = super().step()
        num_rows = min(4, self.num_unfinished + len(out))
        record = StepRecord(
            num_rows=num_rows,
            num_emitted_tokens=num_rows,
            num_drafted_tokens=2,
            num_verified_draft_tokens=1,
            num_accepted_tokens=1,
            draft_lengths=[1, 0, 0, 0],
            accepted_lengths=[1, 0, 0, 0],
        )
        self.stats.add(record)
        return out


def test_tokens_of_samples_that_still_decode_count_where_the_engine_tells_them() -> None:
    inner = MeasuredEngine()
    engine = CountingEngine(inner)
    for n in range(40):
        engine.add(Request(id=str(n), prompt=f"p{n}"))
    engine.step()
    counts = engine.counts
    assert (counts.num_generated_tokens, counts.num_rounds) == (4, 4)
    assert (counts.num_drafted_tokens, counts.num_verified_tokens, counts.num_accepted_tokens) == (2, 1, 1)
    assert (counts.num_steps, engine.by_position, engine.device) == (1, [(1, 1)], "cuda")
    assert engine.num_processed == 4 + counts.num_samples
    inner.stats.last = StepRecord(num_queued=38)
    assert engine.load.num_queued >= 36
