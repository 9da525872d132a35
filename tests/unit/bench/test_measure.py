"""Engines that take turns step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from dspark_batch.bench.measure import Setting, measure, measure_in_turns
from dspark_batch.bench.scheduler import LastingPolicy
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.scheduling.policies import FixedLength, RoundLoad
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

REQUESTS = [
    Request(id=str(i), prompt="abcabcab"[: 3 + i], sampling=SamplingParams(max_new_tokens=4 + 3 * i, ignore_eos=True))
    for i in range(5)
]


@pytest.fixture
def loaded() -> ScriptedModel:
    target = ScriptedTarget(vocab_size=len(LetterCodec.alphabet), contrast=8.0)
    return ScriptedModel(target=target, codec=LetterCodec(), eos_token_ids=frozenset())


class Noting(LastingPolicy):
    """A fixed length; notes itself whenever a round is planned."""

    def __init__(self, length: int, order: list[int]) -> None:
        super().__init__(FixedLength(length))
        self._length, self._order = length, order

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        self._order.append(self._length)
        return super().draft_lengths(load)


def test_engines_take_turns_and_each_does_what_it_does_alone(loaded: ScriptedModel) -> None:
    order: list[int] = []
    config = EngineConfig(drafter="ngram", max_concurrency=2)
    settings = [Setting(config=config, policy=Noting(length, order)) for length in (0, 2, 4)]
    together = measure_in_turns(loaded, settings, REQUESTS)
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > len(order) // 2
    for setting, found in zip(settings, together, strict=True):
        alone = measure(loaded, setting, REQUESTS)
        for count in ("num_rows", "num_prompt_tokens", "num_emitted_tokens", "num_steps", "num_accepted_tokens"):
            assert getattr(found, count) == getattr(alone, count)
        assert 0 < found.tail_s < found.wall_s
        assert found.draft_s + found.forward_s + found.sample_s + found.host_s <= found.wall_s
    assert together[0].num_drafted_tokens == 0 < together[1].num_drafted_tokens
    assert loaded.target.kv.num_used_tokens == 0


def test_a_failed_request_stops_the_measurement(loaded: ScriptedModel) -> None:
    odd = Request(id="odd", prompt_token_ids=(10**6,), sampling=SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match="request 'odd' failed"):
        measure(loaded, Setting(config=EngineConfig(drafter="none")), [*REQUESTS, odd])
