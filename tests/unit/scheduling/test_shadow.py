"""Labels for drafts that were not verified, against a row-by-row oracle on random ragged text."""

from __future__ import annotations

import random

import numpy as np

from dspark_batch.scheduling.policies import RoundOutcome
from dspark_batch.scheduling.shadow import ShadowDrafts, ShadowLabels, labels_of_round
from dspark_batch.scheduling.survival import FlatDraft, SurvivalModel
from dspark_batch.tensors import DraftBlock


def test_drafts_are_followed_to_the_first_token_that_differs() -> None:
    rng = random.Random(0)
    for _ in range(200):
        texts = [[rng.randrange(2) for _ in range(20)] for _ in range(5)]
        drafts = [[rng.randrange(2) for _ in range(rng.choice([0, 1, 3, 7]))] for _ in range(5)]
        shadow = ShadowDrafts(range(5), drafts)
        at = [0] * 5
        while not shadow.is_settled:
            counts = [rng.randint(1, 3) for _ in range(5)]
            shadow.follow({r: texts[r][at[r] : at[r] + counts[r]] for r in range(5)})
            at = [a + c for a, c in zip(at, counts, strict=True)]
        found = shadow.outcome()
        for r, draft in enumerate(drafts):
            held = next((k for k, token in enumerate(draft) if token != texts[r][k]), len(draft))
            assert found.num_held[r] == held
            assert found.num_tried[r] == min(held + 1, len(draft))


def test_a_row_that_leaves_keeps_what_was_seen_and_tells_no_more() -> None:
    shadow = ShadowDrafts([7, 8], [[1, 2, 3], [1, 2, 3]])
    shadow.follow({7: [1], 8: [1]})
    shadow.follow({8: [2]})
    shadow.follow({8: [9]})
    assert shadow.is_settled
    assert shadow.outcome().num_held.tolist() == [1, 2]
    assert shadow.outcome().num_tried.tolist() == [1, 3]


def test_the_token_after_a_cut_draft_tells_about_the_first_one_that_was_cut() -> None:
    draft = DraftBlock(token_ids=[(1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2), ()])
    outcome = RoundOutcome([1, 1, 2, 2, 0], [1, 1, 1, 2, 0], 11, 0, 0.0, 0.1, [[1, 2], [1, 9], [1, 9], [1, 2, 5], [4]])
    flat = FlatDraft.of(draft)
    tried, held = labels_of_round(draft, flat, outcome, may_follow=True)
    assert tried.tolist() == [2, 2, 2, 2, 0]
    assert held.tolist() == [2, 1, 1, 2, 0]
    tried, held = labels_of_round(draft, flat, outcome, may_follow=False)
    assert tried.tolist() == [1, 1, 2, 2, 0]
    assert held.tolist() == [1, 1, 1, 2, 0]


def test_settled_drafts_teach_the_model_once() -> None:
    model = SurvivalModel(4)
    labels = ShadowLabels(model)
    draft = DraftBlock(token_ids=[(1, 2), (5,)], confidence=[(0.9, 0.8), (0.7,)])
    flat = FlatDraft.of(draft)
    model.see(draft, flat, np.array([4, 4]))
    labels.watch([3, 4], draft, flat, [[1], [5]])
    assert model.num_labels == 0
    labels.follow([3, 4], [[2], [6]])
    assert model.num_labels == 3
    labels.follow([3, 4], [[2], [6]])
    assert model.num_labels == 3
