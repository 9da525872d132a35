"""Which tokens a step's forward gets: the slices of all rows and shared prefixes, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.engine.prefixes import Prefix
from dspark_batch.engine.state import RowState
from dspark_batch.tensors import DraftBlock, ForwardBatch, RowSlice


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One slice of the flat forward. owner: the row, or a shared prefix.

    draft: tokens that follow the row's committed ones in the slice: verified, or of choices that are scored.
    wants_logits: the slice ends with the row's last committed token (plus the draft), so a token will be emitted or
    scores will be read.
    """

    owner: RowState | Prefix
    offset: int
    num_tokens: int
    draft: Sequence[int] = ()
    draft_probs: Tensor | None = None
    wants_logits: bool = False

    @property
    def num_positions(self) -> int:
        """Flat positions whose logits are wanted."""
        return len(self.draft) + 1 if self.wants_logits else 0

    @property
    def is_scored(self) -> bool:
        return isinstance(self.owner, RowState) and self.owner.choices is not None


def lay_out(
    decoding: Sequence[RowState], block: DraftBlock, filling: Sequence[RowState | Prefix], *, max_step_tokens: int
) -> tuple[list[Part], list[int]]:
    """The slices of the forward, decoding rows first, and their tokens; within ``max_step_tokens``.

    block: the drafts of the decoding rows. filling: what has no output yet, in the order in which it is served.
    """
    parts: list[Part] = []
    flat: list[int] = []
    for r, row in enumerate(decoding):
        assert row.kv_len == len(row.token_ids) - 1, "invariant 1: only the anchor's KV is missing"
        draft = block.token_ids[r]
        probs = block.probs[r] if block.probs is not None else None
        parts.append(Part(row, len(flat), 1 + len(draft), draft, probs, wants_logits=True))
        flat.append(row.token_ids[-1])
        flat.extend(draft)
    prefix_len: dict[int, int] = {}
    for owner in filling:
        if isinstance(owner, RowState) and _lacks_prefix(owner, prefix_len):
            continue
        room = max_step_tokens - len(flat)
        draft = owner.choices.path.draft if isinstance(owner, RowState) and owner.choices is not None else ()
        ends = isinstance(owner, RowState) and owner.num_pending + len(draft) <= room
        # A choice is scored in one piece with the last token of the prompt, which stays behind where there is no room.
        num_tokens = owner.num_pending if ends else min(owner.num_pending - bool(draft), room)
        if num_tokens <= 0:
            break
        tokens = owner.token_ids[owner.kv_len : owner.kv_len + num_tokens]
        if ends:
            tokens = [*tokens, *draft]
        parts.append(Part(owner, len(flat), len(tokens), draft if ends else (), wants_logits=ends))
        flat.extend(tokens)
        if isinstance(owner, Prefix):
            prefix_len[owner.slot] = owner.kv_len + num_tokens
    return parts, flat


def forward_batch(
    parts: Sequence[Part], token_ids: list[int], *, taps: tuple[int, ...], device: torch.device
) -> ForwardBatch:
    """The slices as the target takes them."""
    index: list[int] = []
    for part in parts:
        end = part.offset + part.num_tokens
        index.extend(range(end - part.num_positions, end))
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
        slices=tuple(RowSlice(p.owner.slot, p.owner.kv_len, p.num_tokens) for p in parts),
        logit_index=torch.tensor(index, dtype=torch.int64).to(device),
        taps=taps,
    )


def _lacks_prefix(row: RowState, computed: dict[int, int]) -> bool:
    """Whether the row's shared prefix is neither ready nor part of this step; ``computed``: its length by slot.

    A layer writes the keys and values of all tokens of a step before it attends.
    """
    return row.prefix is not None and row.is_waiting and computed.get(row.prefix.prefix.slot, 0) < row.prefix.num_tokens
