from dspark_batch.scheduling.policies import FixedLength, RoundLoad
from dspark_batch.tensors import DraftBlock

LOAD = RoundLoad(handles=[4, 5, 6], limits=[0, 3, 9], num_prefill_tokens=0, num_queued=0)


def test_a_fixed_length_is_cut_to_what_a_row_can_use() -> None:
    assert FixedLength(5).draft_lengths(LOAD) == [0, 3, 5]
    assert FixedLength(0).draft_lengths(LOAD) == [0, 0, 0]


def test_all_that_was_drafted_is_verified() -> None:
    block = DraftBlock(token_ids=[(), (1, 2), (3,)])
    assert FixedLength(5).verify_plan(LOAD, block).verify_len == [0, 2, 1]
