"""Token and block verification stay exact under the causal rules, and are biased without them: by enumeration.

A drafter's confidence at position k is a table over the tokens before k, as a confidence head's is. Two rows share the
step, so that the plan of one depends on the draft of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.planner import Admitted, admit, admit_budget, admit_early_stop
from dspark_batch.testing.toy_law import Prefix, Table, joint_law, random_table, round_law, total_variation
from dspark_batch.verification.block import block_decision
from dspark_batch.verification.token import token_decision

Floats = NDArray[np.float64]
Confidences = dict[Prefix, float]
Admit = Callable[..., Admitted]

VOCAB = 3
LAWS = {
    "token": partial(round_law, decide=token_decision, independent=False),
    "block": partial(round_law, decide=block_decision, independent=True),
}
CAUSAL: dict[str, Admit] = {
    "early stop": admit_early_stop,
    **{f"lagged budget of {n}": partial(admit_budget, budget=n) for n in (0, 1, 2, 3, 5)},
}


def confidences(rng: np.random.Generator, depth: int, *, is_tied: bool) -> Confidences:
    """Confidence of position k by the k tokens before it; tied ones are saturated, as in half precision."""
    prefixes = [p for n in range(depth) for p in itertools.product(range(VOCAB), repeat=n)]
    if is_tied:
        return {p: float(rng.choice([1.0, 1.0, 0.5])) for p in prefixes}
    return {p: float(rng.uniform(0.05, 0.999)) for p in prefixes}


def planned(rule: Admit, drafts: Sequence[Prefix], said: Sequence[Confidences], costs: Floats) -> list[int]:
    """Verify length of every row."""
    survival = [np.cumprod([c[x[:k]] for k in range(len(x))]) for x, c in zip(drafts, said, strict=True)]

    def step_seconds(num_extra: Floats) -> Floats:
        seconds: Floats = costs[num_extra.astype(int)]
        return seconds

    admitted = rule(np.concatenate(survival), num_rows=len(drafts), step_seconds=step_seconds, draft_s=0.0)
    ends = np.cumsum([len(x) for x in drafts])
    return [int(part.sum()) for part in np.split(admitted.mask, ends[:-1])]


def law_of_first_row(
    mode: str, rule: Admit, tables: tuple[Table, Table], said: Sequence[Confidences], other: Prefix, costs: Floats
) -> dict[Prefix, float]:
    target, draft = tables

    def extend(before: Prefix, whole: Prefix) -> bool:
        drafts = [whole, other] if other else [whole]
        return len(before) < planned(rule, drafts, said[: len(drafts)], costs)[0]

    size = max(map(len, draft)) + 1
    return LAWS[mode](target, draft, block_size=size, extend=extend, one_hot=False)


def worst_distance(mode: str, rule: Admit, *, seed: int, is_tied: bool, block_size: int = 2) -> float:
    """The largest distance from the target's law over all drafts of the other row, on a cost with a stair."""
    rng = np.random.default_rng(seed)
    target = random_table(rng, vocab_size=VOCAB, depth=block_size + 1)
    draft = random_table(rng, vocab_size=VOCAB, depth=block_size)
    said = [confidences(rng, block_size, is_tied=is_tied) for _ in range(2)]
    costs = np.array([1.0, 1.45, 1.5, 1.55, 1.6, 1.65, 1.7])
    expected = joint_law(target, length=block_size + 1)
    others = [(), *itertools.product(range(VOCAB), repeat=block_size)]
    return max(
        total_variation(law_of_first_row(mode, rule, (target, draft), said, other, costs), expected)
        for other in others[:: max(1, len(others) // 5)]
    )


@pytest.mark.parametrize("is_tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("rule", CAUSAL)
@pytest.mark.parametrize("mode", LAWS)
def test_the_emitted_law_is_the_targets_under_every_causal_rule(mode: str, rule: str, is_tied: bool) -> None:
    for seed in range(2):
        assert worst_distance(mode, CAUSAL[rule], seed=seed, is_tied=is_tied) < 1e-12
    assert worst_distance(mode, CAUSAL[rule], seed=7, is_tied=is_tied, block_size=3) < 1e-12


@pytest.mark.parametrize("mode", LAWS)
def test_a_stop_that_sees_the_whole_draft_biases_the_law(mode: str) -> None:
    assert max(worst_distance(mode, admit, seed=seed, is_tied=False) for seed in range(4)) > 0.005


@pytest.mark.parametrize("mode", LAWS)
def test_a_budget_taken_from_this_rounds_draft_biases_the_law(mode: str) -> None:
    def of_this_round(survival: Floats, **options: object) -> Admitted:
        budget = round(float(survival.sum()))
        return admit_budget(survival, budget=budget, **options)  # type: ignore[arg-type]

    assert max(worst_distance(mode, of_this_round, seed=seed, is_tied=False) for seed in range(4)) > 0.01


@pytest.mark.parametrize("mode", LAWS)
@pytest.mark.parametrize(("rule", "first_token"), [(admit_early_stop, 0.7), (admit, 0.85)])
def test_the_counterexample_of_the_paper(mode: str, rule: Admit, first_token: float) -> None:
    """Appendix A: the target's (0.7, 0.3) becomes (0.85, 0.15) where a stop may look ahead.

    The draft is (0.5, 0.5). After token 0 the second position is sure, after token 1 hopeless, and only two tokens
    together are worth the step: so token 1 is never verified, and drawn anew.
    """
    target: Table = {p: np.array([0.7, 0.3]) for n in range(3) for p in itertools.product((0, 1), repeat=n)}
    draft: Table = {p: np.array([0.5, 0.5]) for n in range(2) for p in itertools.product((0, 1), repeat=n)}
    said = [{(): 0.8, (0,): 1.0, (1,): 0.0}]
    law = law_of_first_row(mode, rule, (target, draft), said, (), np.array([1.0, 1.85, 1.9]))
    assert sum(chance for x, chance in law.items() if x[0] == 0) == pytest.approx(first_token, abs=1e-12)
