"""The automatic schedule under scripted acceptance and a made-up clock."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dspark_batch.metrics import PlanReason
from dspark_batch.scheduling.auto import AutoLength, CausalRule
from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.cost_table import CostTable, DraftSample
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.tensors import DraftBlock
from dspark_batch.testing.schedule_world import DraftKind, ScheduleWorld, known_cost

GAMMA = 8
HOLDS = DraftKind(chance=0.9)
HOPELESS = DraftKind(chance=0.0)


def saturated(tokens: int, rows: int) -> float:
    """Twice the tokens, twice the time."""
    return 0.01 * tokens


def idle(tokens: int, rows: int) -> float:
    """More tokens are nearly free."""
    return 0.01 + 0.00005 * tokens


def knee(tokens: int, rows: int) -> float:
    """A CPU: nearly free up to 16 tokens, then in proportion."""
    return 0.013 + 0.00012 * rows + 0.0003 * tokens + 0.0006 * max(0, tokens - 16)


def stairs(tokens: int, rows: int) -> float:
    """A GPU: whole tiles of 16 tokens."""
    return 0.008 + 0.002 * -(-tokens // 16) + 0.00001 * rows


def world(
    step_s: Callable[[int, int], float],
    kind: DraftKind | Callable[[int], DraftKind],
    *,
    cost: StepCost | None = None,
    policy: LengthPolicy | None = None,
    **options: object,
) -> ScheduleWorld:
    by_row = kind if callable(kind) else lambda handle: kind
    policy = policy or AutoLength(max_draft_tokens=GAMMA, cost=cost or known_cost(step_s))
    return ScheduleWorld(policy, step_s, by_row, **options)  # type: ignore[arg-type]


def says(chance: float, confidence: float | None) -> DraftKind:
    return DraftKind(chance=chance, says=confidence)


SAID = pytest.mark.parametrize("confidence", [None, 0.3, 0.95], ids=["silent", "doubting", "boasting"])


@SAID
@pytest.mark.parametrize("step_s", [saturated, idle, stairs])
@pytest.mark.parametrize("num_rows", [1, 32])
def test_it_comes_down_to_plain_decoding_where_drafts_never_hold(
    step_s: Callable[[int, int], float], confidence: float | None, num_rows: int
) -> None:
    w = world(step_s, says(0.0, confidence), num_rows=num_rows)
    assert w.run(60) >= 0.9 * w.plain_rate()
    assert w.run(240) >= 0.985 * w.plain_rate()


@SAID
def test_it_drafts_in_full_where_drafts_always_hold_and_tokens_are_nearly_free(confidence: float | None) -> None:
    w = world(idle, says(1.0, confidence))
    w.run(50)
    assert w.run(200) > 6.0 * w.plain_rate()
    assert np.mean(w.verified[-200:]) > 0.95 * 8 * GAMMA


@SAID
def test_a_saturated_device_drafts_only_what_surely_holds(confidence: float | None) -> None:
    w = world(saturated, says(0.6, confidence))
    w.run(100)
    assert w.run(400) >= 0.985 * w.plain_rate()


@pytest.mark.parametrize("step_s", [knee, stairs])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("is_silent", [True, False])
def test_it_is_near_the_best_fixed_length(
    chance: float, num_rows: int, step_s: Callable[[int, int], float], is_silent: bool
) -> None:
    """Expected rates of every fixed length, by the closed form."""
    w = world(step_s, says(chance, None if is_silent else 0.8), num_rows=num_rows, noise=0.03)
    w.run(100)
    rate = w.run(300)
    fixed = [
        num_rows
        * sum(chance**i for i in range(n + 1))
        / (step_s(num_rows * (1 + n), num_rows) + (0.0005 if n else 0.0))
        for n in range(GAMMA + 1)
    ]
    assert rate >= 0.93 * max(fixed)
    assert rate >= 0.98 * fixed[0]


def test_repeating_outputs_open_the_gate_within_a_few_rounds() -> None:
    w = world(knee, DraftKind(chance=0.95, offers=0.9, says=0.95))
    w.run(40)
    assert w.run(60) > 1.4 * w.plain_rate()


def test_seldom_matches_are_looked_up_and_do_not_cost_more_than_they_bring() -> None:
    """A suffix drafter on text that hardly repeats: few offers, and those promise more than they hold."""
    for seed in range(3):
        w = world(
            knee,
            DraftKind(chance=0.25, offers=0.3, says=0.75),
            draft_s=lambda rows, longest: 0.0003,
            rng=random.Random(seed),
        )
        assert w.run(500) >= 0.985 * w.plain_rate()


def test_drafting_that_costs_by_the_token_is_kept_short() -> None:
    cheap = world(idle, says(0.7, None))
    dear = world(idle, says(0.7, None), draft_s=lambda rows, longest: 0.004 * longest)
    cheap.run(400)
    dear.run(400)
    assert np.mean(dear.asked[-200:]) < 0.7 * np.mean(cheap.asked[-200:])
    assert dear.run(400) >= 0.98 * dear.plain_rate()


def test_a_drafter_as_dear_as_the_target_is_left_alone_and_seldom_tried() -> None:
    samples = [DraftSample(1, 1, 0.01), DraftSample(64, 1, 0.02)]
    policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(knee), draft_cost=DraftCost(samples))
    w = world(knee, says(0.3, 0.3), policy=policy, draft_s=lambda rows, longest: 0.01, num_rows=32)
    assert w.run(1000) >= 0.985 * w.plain_rate()


@pytest.mark.parametrize(("expected", "is_first_drafted"), [((), False), ((0.8, 0.6, 0.4), True), ((0.2, 0.1), False)])
def test_a_dear_drafter_that_is_known_to_pay_drafts_from_the_first_round(
    expected: tuple[float, ...], is_first_drafted: bool
) -> None:
    block = DraftCost([DraftSample(1, 1, 0.0035), DraftSample(1, 3, 0.0035)])
    policy = AutoLength(max_draft_tokens=3, cost=known_cost(idle), draft_cost=block, expected_survival=expected)
    policy.draft_lengths(RoundLoad((0,), (3,), num_prefill_tokens=0, num_queued=0))
    assert (policy.reason is PlanReason.DRAFTED) is is_first_drafted


def test_rows_near_their_end_neither_close_a_gate_nor_keep_one_from_opening() -> None:
    """A draft of one token for one row of two loses, which says nothing about rows that have more to come."""
    block = DraftCost([DraftSample(2, 1, 0.0045), DraftSample(2, 4, 0.0045)])
    policy = AutoLength(max_draft_tokens=4, cost=known_cost(idle), draft_cost=block, expected_survival=(0.7, 0.5, 0.4))
    w = world(idle, says(0.7, 0.7), policy=policy, num_rows=2, draft_s=lambda rows, longest: 0.0045)
    for _ in range(20):
        w.play([0, 1], limits=[1, 0], num_queued=1)
    assert w.reasons == {PlanReason.NOT_WORTH_IT: 20}
    w.play([0, 1], num_queued=1)
    assert w.reasons[PlanReason.DRAFTED] == 1
    for _ in range(20):
        w.play([0, 1], limits=[0, 1], num_queued=1)
    w.play([0, 1], num_queued=1)
    assert w.reasons[PlanReason.DRAFTED] + w.reasons[PlanReason.STANDING] == 2


def test_rows_that_accept_get_longer_drafts_than_rows_that_do_not() -> None:
    def step_s(tokens: int, rows: int) -> float:
        return 0.01 + 0.0006 * tokens

    w = world(step_s, lambda handle: says(0.95 if handle % 2 else 0.1, None))
    w.run(300)
    load = RoundLoad(handles=list(range(8)), limits=[30] * 8, num_prefill_tokens=0, num_queued=0, num_left=[31] * 8)
    lengths = list(w.policy.draft_lengths(load))
    assert min(lengths[1::2]) > max(lengths[0::2])


def test_rows_on_which_a_dear_drafter_fails_are_seldom_asked() -> None:
    samples = [DraftSample(rows, tokens, 0.0002 + 0.0004 * rows) for rows in (1, 8) for tokens in (1, GAMMA)]
    policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(idle), draft_cost=DraftCost(samples))
    w = world(
        idle,
        lambda handle: says(0.9 if handle < 4 else 0.02, 0.6),
        policy=policy,
        draft_s=lambda rows, longest: 0.0002 + 0.0004 * rows,
    )
    w.run(150)
    w.asked.clear()
    w.run(100)
    assert 4 * GAMMA <= np.mean(w.asked) < 7 * GAMMA


def test_it_takes_drafting_up_again_when_drafts_begin_to_hold() -> None:
    now = [HOPELESS]
    w = world(idle, lambda handle: now[0])
    w.run(600)
    now[0] = DraftKind(chance=0.95)
    w.run(500)
    assert w.run(200) > 2.0 * w.plain_rate()


def test_where_drafting_clearly_pays_plans_stand_until_drafts_fail() -> None:
    now = [says(0.95, 0.95)]
    policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(idle))
    w = world(idle, lambda handle: now[0], policy=policy, num_rows=1)
    w.run(100)
    w.reasons.clear()
    assert w.run(100) > 3 * w.plain_rate()
    assert 2 <= w.reasons[PlanReason.DRAFTED] <= 5
    assert w.reasons[PlanReason.STANDING] >= 90
    now[0] = says(0.0, 0.95)
    w.run(200)
    assert w.run(200) > 0.9 * w.plain_rate()


def test_rounds_with_and_without_prompts_take_turns_without_ending_each_others_plans() -> None:
    w = world(idle, says(0.95, 0.95))
    rounds = [(range(4), 0), (range(7), 100)]
    for _ in range(50):
        for rows, num_prompt_tokens in rounds:
            w.play(rows, num_prefill_tokens=num_prompt_tokens)
    w.reasons.clear()
    for _ in range(50):
        for rows, num_prompt_tokens in rounds:
            w.play(rows, num_prefill_tokens=num_prompt_tokens)
    assert w.reasons[PlanReason.STANDING] >= 80


def test_no_round_is_plain_for_the_sake_of_its_cost_where_prompts_hide_it() -> None:
    w = world(idle, says(0.95, 0.95))
    for _ in range(200):
        w.play(range(4), num_prefill_tokens=100, num_queued=9)
    assert w.reasons[PlanReason.PLAIN_STEP] == 0
    w.run(100, num_queued=9)
    assert w.reasons[PlanReason.PLAIN_STEP] >= 1


def test_a_draining_batch_drafts_for_the_row_that_will_end_last() -> None:
    """Drafted tokens of all rows would not pay: of one row they do, once nobody waits for the others' places."""
    costs: dict[str, object] = {"draft_cost": DraftCost([DraftSample(n, GAMMA, 0.0001 * n) for n in (1, 16)])}
    policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(knee), expected_survival=(0.6, 0.36), **costs)  # type: ignore[arg-type]
    w = world(knee, says(0.6, 0.6), policy=policy, draft_s=lambda rows, longest: 0.0001 * rows)
    limits = [20] * 15 + [400]
    for _ in range(50):
        w.play(range(16), limits=limits, num_queued=9)
    full = np.mean(w.verified[-30:])
    emitted = np.array([w.play(range(16), limits=limits) for _ in range(50)]).mean(0)
    assert emitted[15] > 1.7
    assert emitted[:15].mean() < 1.2
    assert full < 16


def test_rows_that_finish_bring_the_next_try_forward() -> None:
    w = world(saturated, HOPELESS)
    w.run(600)
    w.asked.clear()
    w.run(3, first_handle=100)
    assert any(w.asked)


def test_rows_that_teach_the_drafter_nothing_bring_no_try_forward() -> None:
    def num_tries(*, learns: bool) -> int:
        policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(saturated), learns_from_finished=learns)
        w = world(saturated, HOPELESS, policy=policy)
        w.run(600)
        w.asked.clear()
        for batch in range(1, 33):
            w.run(6, first_handle=100 * batch)
        return sum(map(bool, w.asked))

    assert 0 < 2 * num_tries(learns=False) < num_tries(learns=True)


def test_the_draining_tail_drafts_longer_than_the_full_batch() -> None:
    w = world(knee, says(0.8, 0.8), num_rows=64)
    w.run(100)
    full = np.mean(w.verified[-50:]) / 64
    w.num_rows = 2
    w.run(100)
    assert np.mean(w.verified[-50:]) / 2 > full + 2.0


@pytest.mark.parametrize("confidence", [0.3, 0.95])
@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_table_that_has_tokens_too_dear_is_found_out_though_none_is_drafted_or_all_are_cut(
    num_rows: int, confidence: float
) -> None:
    wrong = known_cost(lambda tokens, rows: 0.002 + 0.008 * tokens)
    w = world(idle, says(0.9, confidence), cost=wrong, num_rows=num_rows)
    w.run(2000)
    assert w.run(200) > 3.0 * w.plain_rate()


def test_a_table_that_is_wrong_about_drafted_tokens_is_found_out() -> None:
    """The table says that tokens are free, and they are not."""
    wrong = known_cost(lambda tokens, rows: 0.02)
    w = world(saturated, says(0.5, 0.9), cost=wrong)
    w.run(200)
    assert w.run(400) >= 0.97 * w.plain_rate()


def test_an_engine_that_shows_no_tokens_is_served_too() -> None:
    w = world(idle, says(0.95, 0.9), shows_tokens=False)
    w.run(150)
    assert w.run(100) > 3.0 * w.plain_rate()
    hopeless = world(knee, says(0.0, 0.9), shows_tokens=False)
    hopeless.run(200)
    assert hopeless.run(400) >= 0.98 * hopeless.plain_rate()


def test_every_round_says_why() -> None:
    w = world(knee, says(0.3, 0.6), num_rows=32)
    w.run(100)
    assert set(w.reasons) <= {PlanReason.EXPLORE, PlanReason.PAUSED, PlanReason.NOT_WORTH_IT, PlanReason.DRAFTED}
    assert w.reasons[PlanReason.EXPLORE] > 0
    assert w.reasons[PlanReason.PAUSED] > w.reasons[PlanReason.EXPLORE]
    good = world(idle, HOLDS)
    good.run(100)
    assert good.reasons[PlanReason.DRAFTED] + good.reasons[PlanReason.STANDING] > 80
    nothing = world(idle, DraftKind(chance=0.9, offers=0.0, says=0.9), num_rows=1)
    nothing.run(30)
    assert nothing.reasons[PlanReason.NO_OFFER] > 0


def test_without_a_cost_table_nothing_is_trimmed_and_it_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        policy = AutoLength(max_draft_tokens=5, cost=None)
        w = world(saturated, says(0.0, 0.01), policy=policy, num_rows=3)
        w.run(20)
    assert w.asked == w.verified == [15] * 20
    assert w.reasons == {PlanReason.NO_TABLE: 20}
    assert sum("no cost table" in message for message in caplog.messages) == 1


def test_limits_are_never_exceeded_and_an_exhausted_batch_is_left_alone() -> None:
    policy = AutoLength(max_draft_tokens=GAMMA, cost=known_cost(idle))
    load = RoundLoad(handles=[1, 2], limits=[0, 3], num_prefill_tokens=50, num_queued=1)
    for _ in range(10):
        lengths = policy.draft_lengths(load)
        assert all(length <= limit for length, limit in zip(lengths, load.limits, strict=True))
        if any(lengths):
            policy.verify_plan(load, DraftBlock(token_ids=[(), (1,) * lengths[1]]))
        policy.observe(load, RoundOutcome([0, 0], [0, 0], 52, 50, 0.0, 0.01))
    done = RoundLoad(handles=[1, 2], limits=[0, 0], num_prefill_tokens=0, num_queued=0)
    assert not any(policy.draft_lengths(done))
    assert policy.reason is PlanReason.AT_LIMIT


def test_longer_contexts_make_drafting_pay_where_keys_are_what_a_step_reads() -> None:
    """The keys of a row are read once, however many of its tokens are verified."""

    def step_s(tokens: int, rows: int, context: int) -> float:
        return 0.0005 * tokens + 0.00001 * rows * context

    table = CostTable.from_function(step_s, rows=(1, 16), contexts=(128, 4096))
    verified = {}
    for context in (128, 4096):
        policy = AutoLength(max_draft_tokens=GAMMA, cost=StepCost(table))
        w = world(
            lambda tokens, rows, at=context: step_s(tokens, rows, at),  # type: ignore[misc]
            says(0.6, 0.6),
            policy=policy,
            num_rows=16,
            context_tokens=float(context),
        )
        w.run(150)
        verified[context] = np.mean(w.verified[-50:])
    assert verified[4096] > verified[128] + 16


@pytest.mark.parametrize("rule", ["early_stop", "lagged"])
def test_sampled_drafts_are_cut_by_the_causal_rules_only(rule: CausalRule) -> None:
    """A stair that only two tokens together are worth: a stop that may look ahead takes it, Algorithm 1 does not."""
    costs = {1: 1.0, 2: 1.95, 3: 2.0, 4: 2.0}
    table = CostTable.from_function(lambda t, r, c: costs[min(t, 4)], rows=(1,), tokens_per_row=(1, 2, 3, 4))
    policy = AutoLength(max_draft_tokens=2, cost=StepCost(table), may_use_draft=False, causal_rule=rule)
    policy._gates[1, False] = Gate(is_open=True)
    probs = [torch.full((2, 2), 0.5)]
    plans = []
    for sure in (0.999, 0.001, 0.999):
        assert policy.draft_lengths(LOAD) == [2]
        sampled = DraftBlock(token_ids=[(0, 1)], probs=probs, confidence=[(0.9, sure)])
        plans.append(policy.verify_plan(LOAD, sampled).verify_len[0])
        policy.observe(LOAD, RoundOutcome([0], [0], 1, 0, 0.0, 0.0, [[7]]))
    # Of the lagged rule, the first round knows no budget, and each later one has that of the round before.
    assert plans == ([0, 0, 0] if rule == "early_stop" else [0, 2, 0])
    one_hot = AutoLength(max_draft_tokens=2, cost=StepCost(table), may_use_draft=False)
    one_hot._gates[1, False] = Gate(is_open=True)
    one_hot.draft_lengths(LOAD)
    assert one_hot.verify_plan(LOAD, DraftBlock(token_ids=[(0, 1)], confidence=[(0.9, 0.999)])).verify_len == [2]


LOAD = RoundLoad(handles=[1], limits=[2], num_prefill_tokens=0, num_queued=0)
