"""Counting what comes out of an engine."""

from __future__ import annotations

from dspark_batch.batch.live import CountingEngine, LiveCounts
from dspark_batch.core import ErrorCode, Request, SamplingParams
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
    assert engine.counts == LiveCounts(num_samples=14, num_generated_tokens=num_tokens, num_rounds=num_tokens)
    assert len(seen) == 14
    engine.close()
    assert inner.is_closed
