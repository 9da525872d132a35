"""The automatic schedule under scripted acceptance and a made-up clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from dspark_batch.scheduling.auto import AutoLength
from dspark_batch.scheduling.cost import StepCost
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.tensors import DraftBlock

GAMMA = 8


def steep(num_tokens: int) -> float:
    """A saturated device: twice the tokens, twice the time."""
    return 0.01 * num_tokens


def flat(num_tokens: int) -> float:
    """An idle device: more tokens are nearly free."""
    return 0.01 + 0.00005 * num_tokens


@dataclass
class World:
    """Rounds of an imaginary engine. chance: that one drafted token holds, by row number."""

    policy: AutoLength
    step_s: Callable[[int], float]
    chance: Callable[[int], float]
    draft_s: Callable[[int], float] = lambda longest: 0.0005
    num_rows: int = 8
    confidence: Callable[[float], float] | None = None
    offers: float = 1.0
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    num_emitted: int = 0
    seconds: float = 0.0
    asked: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)

    def run(self, num_rounds: int, *, first_handle: int = 0) -> float:
        """Plays rounds; gives emitted tokens per second over them."""
        emitted, seconds = self.num_emitted, self.seconds
        for _ in range(num_rounds):
            self._round(list(range(first_handle, first_handle + self.num_rows)))
        return (self.num_emitted - emitted) / (self.seconds - seconds)

    def plain_rate(self) -> float:
        return self.num_rows / self.step_s(self.num_rows)

    def _round(self, handles: Sequence[int]) -> None:
        load = RoundLoad(handles=handles, limits=[30] * len(handles), num_prefill_tokens=0, num_queued=0)
        lengths = list(self.policy.draft_lengths(load))
        assert all(0 <= length <= GAMMA for length in lengths)
        verify, draft_s = [0] * len(handles), 0.0
        if any(lengths):
            draft_s = self.draft_s(max(lengths))
            offered = [length if self.rng.random() < self.offers else 0 for length in lengths]
            verify = list(self.policy.verify_plan(load, self._block(handles, offered)).verify_len)
            assert all(v <= o for v, o in zip(verify, offered, strict=True))
        accepted = [self._held(handle, length) for handle, length in zip(handles, verify, strict=True)]
        num_tokens = len(handles) + sum(verify)
        step_s = self.step_s(num_tokens) * self.rng.uniform(0.95, 1.05)
        self.policy.observe(load, RoundOutcome(verify, accepted, num_tokens, 0, draft_s, step_s))
        self.num_emitted += len(handles) + sum(accepted)
        self.seconds += draft_s + self.step_s(num_tokens)
        self.asked.append(sum(lengths))
        self.verified.append(sum(verify))

    def _block(self, handles: Sequence[int], offered: Sequence[int]) -> DraftBlock:
        says = self.confidence
        confidence = None
        if says is not None:
            confidence = [[says(self.chance(h))] * n for h, n in zip(handles, offered, strict=True)]
        return DraftBlock(token_ids=[[1] * n for n in offered], confidence=confidence)

    def _held(self, handle: int, length: int) -> int:
        held = 0
        while held < length and self.rng.random() < self.chance(handle):
            held += 1
        return held


def world(step_s: Callable[[int], float], chance: float | Callable[[int], float], **options: object) -> World:
    by_row = chance if callable(chance) else lambda handle: chance
    return World(AutoLength(max_draft_tokens=GAMMA), step_s, by_row, **options)  # type: ignore[arg-type]


CONFIDENCES = [None, lambda chance: chance, lambda chance: 0.95]
CONFIDENCE_NAMES = ["silent", "honest", "boasting"]


@pytest.mark.parametrize("confidence", CONFIDENCES, ids=CONFIDENCE_NAMES)
@pytest.mark.parametrize("step_s", [steep, flat])
def test_it_comes_down_to_plain_decoding_where_drafts_never_hold(
    step_s: Callable[[int], float], confidence: Callable[[float], float] | None
) -> None:
    w = world(step_s, 0.0, confidence=confidence)
    w.run(200)
    assert w.run(1000) >= 0.99 * w.plain_rate()
    assert sum(map(bool, w.asked[-1000:])) < 60


@pytest.mark.parametrize("confidence", CONFIDENCES, ids=CONFIDENCE_NAMES)
def test_it_drafts_in_full_where_drafts_always_hold_and_tokens_are_nearly_free(
    confidence: Callable[[float], float] | None,
) -> None:
    w = world(flat, 1.0, confidence=confidence)
    w.run(50)
    assert w.run(200) > 6.0 * w.plain_rate()
    assert np.mean(w.verified[-200:]) > 0.95 * 8 * GAMMA


@pytest.mark.parametrize("confidence", CONFIDENCES, ids=CONFIDENCE_NAMES)
def test_a_saturated_device_drafts_only_what_surely_holds(confidence: Callable[[float], float] | None) -> None:
    w = world(steep, 0.6, confidence=confidence)
    w.run(200)
    assert w.run(1000) >= 0.98 * w.plain_rate()


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("slope", [0.0, 0.0002, 0.001])
def test_it_is_near_the_best_fixed_length(chance: float, slope: float) -> None:
    """Expected rates of every fixed length, by the closed form. The cost was profiled; acceptance must be learned."""

    def step_s(num_tokens: int) -> float:
        return 0.01 + slope * num_tokens

    w = world(step_s, chance)
    w.policy.cost = StepCost({n: step_s(n) for n in (1, 8, 32, 128)})
    w.run(300)
    rate = w.run(1500)
    fixed = [
        8 * sum(chance**i for i in range(n + 1)) / (step_s(8 * (1 + n)) + (0.0005 if n else 0.0))
        for n in range(GAMMA + 1)
    ]
    assert rate >= 0.93 * max(fixed)
    assert rate >= 0.98 * fixed[0]


def test_drafting_that_costs_by_the_token_is_kept_short() -> None:
    cheap = world(flat, 0.7)
    dear = world(flat, 0.7, draft_s=lambda longest: 0.004 * longest)
    cheap.run(400)
    dear.run(400)
    assert np.mean(dear.asked[-200:]) < 0.7 * np.mean(cheap.asked[-200:])
    assert dear.run(400) >= 0.98 * dear.plain_rate()


def test_rows_that_accept_get_longer_drafts_than_rows_that_do_not() -> None:
    w = world(lambda n: 0.01 + 0.0006 * n, lambda handle: 0.95 if handle % 2 else 0.1)
    w.run(300)
    load = RoundLoad(handles=list(range(8)), limits=[30] * 8, num_prefill_tokens=0, num_queued=0)
    lengths = list(w.policy.draft_lengths(load))
    assert min(lengths[1::2]) > max(lengths[0::2])


def test_it_takes_drafting_up_again_when_drafts_begin_to_hold() -> None:
    chances = [0.0]
    w = world(flat, lambda handle: chances[0])
    w.run(600)
    chances[0] = 0.95
    w.run(600)
    assert w.run(200) > 2.0 * w.plain_rate()


def test_rows_that_finish_bring_the_next_try_forward() -> None:
    w = world(flat, 0.0)
    w.run(600)
    w.asked.clear()
    w.run(3, first_handle=100)
    assert any(w.asked)


def test_a_drafter_that_seldom_has_an_offer_stays_in_use_while_its_offers_hold() -> None:
    w = world(flat, 0.95, offers=0.1, num_rows=1, confidence=lambda chance: 0.9)
    w.run(200)
    assert w.run(1000) > 1.2 * w.plain_rate()


def test_limits_are_never_exceeded_and_an_exhausted_batch_is_left_alone() -> None:
    policy = AutoLength(max_draft_tokens=GAMMA)
    load = RoundLoad(handles=[1, 2], limits=[0, 3], num_prefill_tokens=50, num_queued=1)
    for _ in range(10):
        lengths = policy.draft_lengths(load)
        assert all(length <= limit for length, limit in zip(lengths, load.limits, strict=True))
        if any(lengths):
            policy.verify_plan(load, DraftBlock(token_ids=[(), (1,) * lengths[1]]))
        policy.observe(load, RoundOutcome([0, 0], [0, 0], 52, 50, 0.0, 0.01))
    done = RoundLoad(handles=[1, 2], limits=[0, 0], num_prefill_tokens=0, num_queued=0)
    assert not any(policy.draft_lengths(done))


def test_sampled_drafts_are_not_cut_by_their_own_confidence_in_rejection_modes() -> None:
    import torch

    policy = AutoLength(max_draft_tokens=4, cost=StepCost({1: 1.0, 64: 1.2}), may_use_draft=False)
    load = RoundLoad(handles=[1], limits=[4], num_prefill_tokens=0, num_queued=0)
    lengths = policy.draft_lengths(load)
    tokens = [(3,) * lengths[0]]
    doubtful = [[0.01] * lengths[0]]
    sampled = DraftBlock(token_ids=tokens, probs=[torch.full((lengths[0], 5), 0.2)], confidence=doubtful)
    assert lengths[0] > 0
    assert policy.verify_plan(load, sampled).verify_len == [lengths[0]]
    policy.cost = StepCost({1: 1.0, 64: 64.0})
    one_hot = DraftBlock(token_ids=tokens, confidence=doubtful)
    assert policy.verify_plan(load, one_hot).verify_len == [0]


def test_the_gate_pauses_longer_each_time_and_opens_for_good_when_it_pays() -> None:
    gate, pauses = Gate(), []
    for _ in range(7):
        while gate.is_open:
            gate.observe(-0.1, num_rows=64)
        pauses.append(gate.num_left)
        while not gate.is_open:
            gate.skip()
    assert pauses == [16, 32, 64, 128, 256, 256, 256]
    for _ in range(50):
        gate.observe(0.1, num_rows=64)
    assert gate.is_open
    assert gate.pause == 16
