"""Tensors that cross package borders, and the legend of their shapes and symbols.

Shape letters: R requests (rows), K draft positions, T flat tokens, N flat positions that need logits, V vocabulary,
H hidden, L layers, Hq query heads, Hkv key/value heads, D head dimension.

Paper symbols (arXiv 2607.05147), named once: γ ``block_size``; c ``confidence``; a ``survival`` (running product of
c); ℓ ``verify_len``; τ ``accepted_len`` (emitted tokens of a round, bonus included); B ``num_tokens`` (flat tokens of a
verify forward); Θ ``tokens_per_s``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowSlice:
    """One row's part of a flat forward: ``num_tokens`` query tokens at positions kv_len .. kv_len+num_tokens-1.

    Token j of the slice sees exactly the row's KV[0 : kv_len + j + 1]. ``slot`` is the row's handle in the KV cache.
    """

    slot: int
    kv_len: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Flat, ragged input of one target forward: decode, verify and prefill slices side by side, no padding.

    token_ids: [T] int64, the slices' tokens one after another; T is the sum of the slices' ``num_tokens``.
    slices: the rows, in flat order; every slot at most once.
    logit_index: [N] int64, increasing flat indexes whose logits are wanted.
    taps: decoder layers whose outputs are wanted (id k = output of layer k, -1 = embedding output).
    """

    token_ids: Tensor
    slices: tuple[RowSlice, ...]
    logit_index: Tensor
    taps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """hidden: [N, H] final-norm output at ``logit_index``. features: [T, len(taps) * H] or None without taps."""

    hidden: Tensor
    features: Tensor | None = None


class KVStore(Protocol):
    """Owner of the KV memory. A slot is a row's reservation of a fixed number of tokens; it never moves or grows."""

    @property
    def num_total_tokens(self) -> int: ...

    @property
    def num_free_tokens(self) -> int: ...

    def allocate(self, num_tokens: int, *, prefix: int | None = None, prefix_len: int = 0) -> int | None:
        """Reserve room for positions prefix_len .. prefix_len+num_tokens-1; None when there is no room now.

        With ``prefix``, positions below ``prefix_len`` are read from that slot, which stays alive while shared.
        """
        ...

    def free(self, slot: int) -> None: ...

    def poison(self, slot: int, kv_len: int) -> None:
        """Fill the slot's KV at and past ``kv_len`` with NaN (tests: dead KV must never be read)."""
        ...

    def check_integrity(self) -> None: ...


class Target(Protocol):
    """The model whose distribution is served, with its KV memory. ``models.runner`` has the real one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def kv(self) -> KVStore: ...

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Write the KV of every flat token, and give hidden states where asked."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32. Callers chunk over N."""
        ...


class FastDraws(Protocol):
    """Draws by kernels of the target's device. Everything they give equals what ``sampling`` gives."""

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H] -> tokens [N] int64, and [N] bool whether the logits were finite, without storing logits."""
        ...

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[N, V] float32 -> first largest index [N] int64, -1 where a logit is NaN, and its lead over the next."""
        ...

    def draw(self, logits: Tensor, *, flat: Tensor, integers: Tensor, reals: Tensor) -> Tensor:
        """Tokens of M positions, [M] int64; -1 where rounding could decide, and ``sampling`` must draw instead.

        logits: [N, V] float32, contiguous. flat: [M] int64, which rows of them. integers: [M, 4] int64: top_k (0
        without), noise key, position, arg-max. reals: [M, 3] float64: temperature, top_p (1 without), min_p.
        """
        ...


@runtime_checkable
class OffersFastDraws(Protocol):
    """What a ``Target`` may have besides. ``fast_draws`` is None where the device has no such kernels."""

    @property
    def fast_draws(self) -> FastDraws | None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """The draft layers of a block drafter, for a device that runs them in one call.

    tensors: under the names of a Qwen3 checkpoint without ``model.``: ``layers.0.self_attn.q_proj.weight`` to
    ``norm.weight``. cos, sin: [P, D/2], of every position that a block may reach.
    """

    tensors: Mapping[str, Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """What a drafter proposes for the rows of one round, ragged: ``token_ids[r]`` may be empty.

    probs: per row [K_r, V] float32, exactly what each token was sampled from; None where the draft is one-hot.
    confidence: per row K_r numbers in (0, 1), the chance that slot k is accepted given the earlier ones were; or None.
    margin: per row K_r numbers >= 0, the lead of the best draft score over the next one, NaN for drafts without scores;
    or None. Scores are logits, or logits over temperature plus noise where the draft is drawn with the target's noise.
    Where there are probs, confidence and margin of slot k depend on the tokens before slot k only.
    """

    token_ids: Sequence[Sequence[int]]
    probs: Sequence[Tensor | None] | None = None
    confidence: Sequence[Sequence[float]] | None = None
    margin: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """verify_len[r] <= len(draft.token_ids[r]): how many drafted tokens of each row go into the target forward."""

    verify_len: Sequence[int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a round per row: ``num_accepted[r]`` drafted tokens stand, then ``next_token[r]`` is emitted."""

    num_accepted: Sequence[int]
    next_token: Sequence[int]
