import torch

from dspark_batch.metrics import PlanReason
from dspark_batch.scheduling.policies import FixedLength, RoundLoad, ThresholdLength
from dspark_batch.tensors import DraftBlock

LOAD = RoundLoad(handles=[4, 5, 6], limits=[0, 3, 9], num_prefill_tokens=0, num_queued=0)


def test_a_fixed_length_is_cut_to_what_a_row_can_use() -> None:
    assert FixedLength(5).draft_lengths(LOAD) == [0, 3, 5]
    assert FixedLength(0).draft_lengths(LOAD) == [0, 0, 0]


def test_all_that_was_drafted_is_verified() -> None:
    block = DraftBlock(token_ids=[(), (1, 2), (3,)])
    assert FixedLength(5).verify_plan(LOAD, block).verify_len == [0, 2, 1]


def test_the_threshold_cuts_where_the_running_product_falls_below_it() -> None:
    block = DraftBlock(token_ids=[(), (1, 2, 3), (4, 5)], confidence=[(), (0.9, 0.8, 0.6), (0.4, 1.0)])
    assert ThresholdLength(5, survival=0.5).verify_plan(LOAD, block).verify_len == [0, 2, 0]
    assert ThresholdLength(5).draft_lengths(LOAD) == [0, 3, 5]


def test_the_threshold_verifies_everything_where_the_drafter_says_nothing() -> None:
    silent = DraftBlock(token_ids=[(), (1, 2, 3), (4, 5)])
    assert ThresholdLength(5).verify_plan(LOAD, silent).verify_len == [0, 3, 2]


def test_the_threshold_cuts_sampled_drafts_too_because_it_sees_earlier_tokens_only() -> None:
    sampled = DraftBlock(token_ids=[(), (1,), ()], probs=[None, torch.ones(1, 4), None], confidence=[(), (0.1,), ()])
    assert ThresholdLength(5).verify_plan(LOAD, sampled).verify_len == [0, 0, 0]


def test_policies_say_why() -> None:
    assert FixedLength(0).reason is PlanReason.OFF
    assert FixedLength(2).reason is PlanReason.FIXED
    assert ThresholdLength(2).reason is PlanReason.THRESHOLD
