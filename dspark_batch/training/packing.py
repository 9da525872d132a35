"""Which blocks go into which training step, and what a step's batch looks like. Host work only, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.training.sequences import TokenRow

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Blocks of one row: a block starts at each position of ``anchors``, which increase."""

    row: int
    anchors: Index


@dataclass(frozen=True, slots=True)
class Place:
    """Where the order of blocks goes on: row number ``index`` of the epoch's order, from its anchor ``offset`` on."""

    epoch: int = 0
    index: int = 0
    offset: int = 0


class BlockOrder:
    """An endless order of blocks: every epoch visits all rows in a new order, each with all of its anchors or with
    ``anchors_per_row`` of them drawn anew. A function of the seed and the place alone, so that training can resume.
    """

    def __init__(self, rows: Sequence[TokenRow], *, anchors_per_row: int | None, seed: int) -> None:
        if not any(row.num_anchors for row in rows):
            raise ValueError(f"none of {len(rows)} rows has a response of two tokens, so there is nothing to train on")
        self._rows, self._per_row, self._seed = rows, anchors_per_row, seed
        self._order_of: tuple[int, Index] | None = None

    def take(self, place: Place, num_blocks: int) -> tuple[list[Piece], Place]:
        """The next ``num_blocks`` blocks as pieces, and the place after them. A row may be split over two steps."""
        pieces: list[Piece] = []
        while num_blocks:
            order = self._order(place.epoch)
            if place.index == len(order):
                place = Place(place.epoch + 1)
                continue
            row = int(order[place.index])
            anchors = self._anchors(place.epoch, row)
            chosen = anchors[place.offset : place.offset + num_blocks]
            if len(chosen):
                pieces.append(Piece(row, chosen))
                num_blocks -= len(chosen)
            is_done = place.offset + len(chosen) >= len(anchors)
            index, offset = (place.index + 1, 0) if is_done else (place.index, place.offset + len(chosen))
            place = Place(place.epoch, index, offset)
        return pieces, place

    def num_blocks_per_epoch(self) -> int:
        limit = self._per_row
        return sum(row.num_anchors if limit is None else min(limit, row.num_anchors) for row in self._rows)

    def _order(self, epoch: int) -> Index:
        if self._order_of is None or self._order_of[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
            self._order_of = (epoch, order.astype(np.int64))
        return self._order_of[1]

    def _anchors(self, epoch: int, row: int) -> Index:
        first, count = self._rows[row].prompt_len, self._rows[row].num_anchors
        if self._per_row is None or count <= self._per_row:
            return np.arange(first, first + count, dtype=np.int64)
        random = np.random.default_rng((self._seed, epoch, row))
        return np.sort(random.choice(count, self._per_row, replace=False)).astype(np.int64) + first


@dataclass(frozen=True, slots=True, eq=False)
class ContextSpan:
    """One piece's part of the flat batch: blocks first_block .. +num_blocks-1 see flat context tokens
    first_token .. +num_tokens-1, each those before its anchor."""

    first_block: int
    num_blocks: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class PackedBlocks:
    """A dense batch of A blocks with γ slots each, over C flat context tokens and U flat target positions.

    spans: in order, they tile blocks and context. rows: row number of each span. anchors: [A] positions.
    anchor_ids: [A] tokens. previous_ids, target_ids: [A, γ], the true token before the one that slot k predicts, and
    that token itself (0 where there is none). is_real: [A, γ] whether it exists. target_index: [A, γ] into the U
    positions, which are ``positions[s]`` of span s, one span after the other.
    """

    spans: tuple[ContextSpan, ...]
    rows: tuple[int, ...]
    anchors: Index
    anchor_ids: Index
    previous_ids: Index
    target_ids: Index
    is_real: NDArray[np.bool_]
    target_index: Index
    positions: tuple[Index, ...]

    @property
    def num_positions(self) -> int:
        """Slots that are trained on."""
        return int(self.is_real.sum())

    @property
    def num_context_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_attended(self) -> int:
        """Pairs of a block and a context token that it sees."""
        return int(self.anchors.sum())


def pack(pieces: Sequence[Piece], rows: Sequence[TokenRow], *, num_slots: int) -> PackedBlocks:
    """Lay pieces side by side. Slot k of a block at anchor n predicts position n+k+1; the target does so at n+k."""
    steps = np.arange(num_slots)
    spans: list[ContextSpan] = []
    parts: list[tuple[Index, Index, Index, Index, NDArray[np.bool_], Index]] = []
    positions: list[Index] = []
    first_block = first_token = first_position = 0
    for piece in pieces:
        tokens, anchors = rows[piece.row].token_ids.astype(np.int64), piece.anchors
        before = anchors[:, None] + steps
        is_real = before + 1 < len(tokens)
        last = len(tokens) - 1
        used, place = np.unique(np.minimum(before, last), return_inverse=True)
        previous, target = tokens[np.minimum(before, last)], tokens[np.minimum(before + 1, last)] * is_real
        parts.append(
            (anchors, tokens[anchors], previous, target, is_real, place.reshape(before.shape) + first_position)
        )
        positions.append(used)
        num_tokens = int(anchors[-1])
        spans.append(ContextSpan(first_block, len(anchors), first_token, num_tokens))
        first_block, first_token = first_block + len(anchors), first_token + num_tokens
        first_position += len(used)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return PackedBlocks(
        spans=tuple(spans),
        rows=tuple(piece.row for piece in pieces),
        anchors=columns[0],
        anchor_ids=columns[1],
        previous_ids=columns[2],
        target_ids=columns[3],
        is_real=columns[4],
        target_index=columns[5],
        positions=tuple(positions),
    )
