"""Token and block verification emit exactly the target's law: every draft and every outcome is enumerated."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dspark_batch.testing.toy_law import (
    Prefix,
    Table,
    joint_law,
    one_hot_table,
    random_table,
    round_law,
    total_variation,
)
from dspark_batch.verification.block import block_decision
from dspark_batch.verification.rejection import make_slots
from dspark_batch.verification.token import token_decision

VOCAB = 3
LAWS = {
    "token": partial(round_law, decide=token_decision, independent=False),
    "block": partial(round_law, decide=block_decision, independent=True),
}


def everything(before: Prefix, draft: Prefix) -> bool:
    return True


def earlier_tokens_only(before: Prefix, draft: Prefix) -> bool:
    return hash((len(before), sum(before) % 3)) % 5 != 0 and before[-1:] != (2,)


def the_trimmed_token_itself(before: Prefix, draft: Prefix) -> bool:
    return draft[len(before)] != 0


def tables(seed: int, block_size: int, zeros: float) -> tuple[Table, Table]:
    rng = np.random.default_rng(seed)
    make = partial(random_table, rng, vocab_size=VOCAB, zeros=zeros)
    return make(depth=block_size + 1), make(depth=block_size)


@pytest.mark.parametrize("mode", LAWS)
@pytest.mark.parametrize(("block_size", "zeros"), [(1, 0.0), (2, 0.3), (3, 0.0), (3, 0.4), (4, 0.2)])
@pytest.mark.parametrize("extend", [everything, earlier_tokens_only])
def test_the_emitted_law_is_the_targets(mode: str, block_size: int, zeros: float, extend: object) -> None:
    for seed in range(2):
        target, draft = tables(seed, block_size, zeros)
        law = LAWS[mode](target, draft, block_size=block_size, extend=extend, one_hot=False)
        assert total_variation(law, joint_law(target, length=block_size + 1)) < 1e-12


@pytest.mark.parametrize("mode", LAWS)
@pytest.mark.parametrize("closed_form", [True, False])
def test_one_hot_drafts_keep_the_law_with_and_without_probabilities(mode: str, closed_form: bool) -> None:
    for seed in range(4):
        target, draft = tables(seed, 4, 0.2)
        law = LAWS[mode](target, one_hot_table(draft), block_size=4, extend=everything, one_hot=closed_form)
        assert total_variation(law, joint_law(target, length=5)) < 1e-12


@pytest.mark.parametrize("mode", LAWS)
def test_a_verify_length_that_looks_at_the_trimmed_token_biases_the_law(mode: str) -> None:
    target, draft = tables(0, 3, 0.0)
    law = LAWS[mode](target, draft, block_size=3, extend=the_trimmed_token_itself, one_hot=False)
    assert total_variation(law, joint_law(target, length=4)) > 0.01


def test_block_accepts_a_ninth_more_than_token_on_the_papers_two_token_example() -> None:
    # Uniform-free closed form: p = (1/3, 2/3), q = (2/3, 1/3) at every position, two drafts.
    p, q = np.array([1 / 3, 2 / 3]), np.array([2 / 3, 1 / 3])
    target: Table = dict.fromkeys([(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)], p)
    draft: Table = dict.fromkeys([(), (0,), (1,)], q)
    assert mean_accepted(target, draft, "token") == pytest.approx(10 / 9)
    assert mean_accepted(target, draft, "block") == pytest.approx(11 / 9)


def mean_accepted(target: Table, draft: Table, mode: str) -> float:
    drafts = joint_law(draft, length=2)
    slots = make_slots(list(drafts), [False] * len(drafts), torch.device("cpu"))
    p = torch.tensor(np.array([target[x[:k]] for x in drafts for k in range(3)]))
    q = torch.tensor(np.array([draft[x[:k]] for x in drafts for k in range(2)]))
    if mode == "token":
        h = token_decision(slots, p, q).thresholds
        mean = h[:, 0] + h[:, 0] * h[:, 1]
    else:
        h = block_decision(slots, p, q).thresholds
        mean = 2 * h[:, 1] + (1 - h[:, 1]) * h[:, 0]
    return float((torch.tensor(list(drafts.values())) * mean).sum())
