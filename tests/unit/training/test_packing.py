"""Blocks in order, without gaps or repeats, and what a packed batch says about each slot."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.testing.tiny_training import random_rows
from dspark_batch.training.packing import BlockOrder, Piece, Place, pack

SIZES = [(3, 7), (5, 2), (1, 13), (4, 1), (2, 5)]


def taken(order: BlockOrder, *, num_blocks: int, times: int, place: Place | None = None) -> list[tuple[int, int]]:
    """(row, anchor) of the blocks, in order."""
    place = place or Place()
    out = []
    for _ in range(times):
        pieces, place = order.take(place, num_blocks)
        out += [(piece.row, int(anchor)) for piece in pieces for anchor in piece.anchors]
    return out


def test_every_step_has_the_same_number_of_blocks_and_an_epoch_visits_each_anchor_once() -> None:
    rows = random_rows(SIZES)
    order = BlockOrder(rows, anchors_per_row=None, seed=5)
    total = order.num_blocks_per_epoch()
    assert total == 6 + 1 + 12 + 0 + 4
    blocks = taken(order, num_blocks=total, times=2)
    expected = {(r, a) for r, (p, n) in enumerate(SIZES) for a in range(p, p + n - 1)}
    for epoch in (blocks[:total], blocks[total:]):
        assert set(epoch) == expected
        assert len(epoch) == total
    assert blocks[:total] != blocks[total:]


@pytest.mark.parametrize("num_blocks", [1, 7, 40])
def test_the_order_of_blocks_does_not_depend_on_the_size_of_steps(num_blocks: int) -> None:
    order = BlockOrder(random_rows(SIZES), anchors_per_row=None, seed=5)
    assert taken(order, num_blocks=num_blocks, times=280 // num_blocks)[:120] == taken(order, num_blocks=120, times=1)


def test_a_place_is_all_that_is_needed_to_go_on() -> None:
    rows = random_rows(SIZES)
    place = Place()
    order = BlockOrder(rows, anchors_per_row=2, seed=5)
    for _ in range(9):
        _, place = order.take(place, 5)
    again = BlockOrder(rows, anchors_per_row=2, seed=5)
    assert taken(again, num_blocks=5, times=3, place=place) == taken(order, num_blocks=5, times=3, place=place)


def test_sampled_anchors_are_limited_per_row_and_drawn_anew_each_epoch() -> None:
    rows = random_rows([(2, 40), (3, 3)])
    order = BlockOrder(rows, anchors_per_row=4, seed=5)
    assert order.num_blocks_per_epoch() == 4 + 2
    blocks = taken(order, num_blocks=6, times=2)
    first, second = ({b for b in part if b[0] == 0} for part in (blocks[:6], blocks[6:]))
    assert len(first) == len(second) == 4
    assert first != second


def test_rows_without_any_anchor_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        BlockOrder(random_rows([(4, 1)]), anchors_per_row=None, seed=0)


def test_slots_name_the_true_tokens_and_the_target_position_that_predicts_them() -> None:
    rows = random_rows([(3, 6), (2, 4)])
    pieces = [Piece(1, np.array([2, 4])), Piece(0, np.array([3, 5, 7]))]
    batch = pack(pieces, rows, num_slots=3)
    assert batch.num_context_tokens == 4 + 7
    assert batch.num_attended == int(batch.anchors.sum()) == 2 + 4 + 3 + 5 + 7
    flat_positions = [(row, int(p)) for row, part in zip(batch.rows, batch.positions, strict=True) for p in part]
    block = 0
    for piece in pieces:
        tokens = rows[piece.row].token_ids
        for anchor in piece.anchors:
            assert batch.anchor_ids[block] == tokens[anchor]
            for slot in range(3):
                is_real = anchor + slot + 1 < len(tokens)
                assert batch.is_real[block, slot] == is_real
                if is_real:
                    assert batch.previous_ids[block, slot] == tokens[anchor + slot]
                    assert batch.target_ids[block, slot] == tokens[anchor + slot + 1]
                    assert flat_positions[batch.target_index[block, slot]] == (piece.row, anchor + slot)
            block += 1
    assert batch.num_positions == int(batch.is_real.sum())
