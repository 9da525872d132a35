"""The sequential heads of DSpark: a low-rank bias on the block's logits that depends on the token before.

Source: arXiv 2607.05147 and the published DeepSpec checkpoints. r is the rank; W1[x] is a row of ``markov_w1`` [V, r],
W2 is ``markov_w2`` [Vd, r] for a draft vocabulary of Vd tokens. Nothing here is done in place, so with plain products
the heads can be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.target_parts import LinearOp, MakeLinear

_PREFIX = "markov_head."


class MarkovHead(Protocol):
    """Called slot by slot, left to right, for all rows at once."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """W1[x]: [...] int64 target token ids -> [..., r]."""
        ...

    def bias(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits' bias [R, Vd] of one slot, and the state for the next.

        previous: [R, r], W1 of the token before the one that the slot predicts. hidden: [R, H] output of the backbone
        at the slot. state: None in the first slot.
        """
        ...


class VanillaHead:
    """bias = W2 W1[x]."""

    def __init__(self, weights: Mapping[str, Tensor], *, linear: MakeLinear) -> None:
        self._w1 = weights[f"{_PREFIX}markov_w1.weight"]
        self._w2: LinearOp = linear(weights[f"{_PREFIX}markov_w2.weight"], float32=True)

    def embed(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._w1)

    def bias(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._w2(previous), None


class GatedHead(VanillaHead):
    """bias = W2 (g * W1[x]), g = sigmoid(gate [h; W1[x]])."""

    def __init__(self, weights: Mapping[str, Tensor], *, linear: MakeLinear) -> None:
        super().__init__(weights, linear=linear)
        self._gate: LinearOp = linear(weights[f"{_PREFIX}gate_proj.weight"])
        self._gate_bias = weights[f"{_PREFIX}gate_proj.bias"]

    def bias(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self._gate(torch.cat((hidden, previous), dim=-1)) + self._gate_bias)
        return self._w2(gate * previous), None


class RnnHead(VanillaHead):
    """A joint projection of [s; W1[x]; h] gives gate g, candidate c and output o; s' = g s + (1 - g) tanh c and
    bias = W2 tanh o. The state starts at zero."""

    def __init__(self, weights: Mapping[str, Tensor], *, linear: MakeLinear) -> None:
        super().__init__(weights, linear=linear)
        self._joint: LinearOp = linear(weights[f"{_PREFIX}joint_proj.weight"])
        self._joint_bias = weights[f"{_PREFIX}joint_proj.bias"]

    def bias(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        state = torch.zeros_like(previous) if state is None else state
        joint = self._joint(torch.cat((state, previous, hidden), dim=-1)) + self._joint_bias
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return self._w2(torch.tanh(output)), state


def markov_head(config: DSparkConfig, weights: Mapping[str, Tensor], *, linear: MakeLinear) -> MarkovHead | None:
    """The head that the config names; None for a drafter without one."""
    match config.markov:
        case None:
            return None
        case "vanilla":
            return VanillaHead(weights, linear=linear)
        case "gated":
            return GatedHead(weights, linear=linear)
        case "rnn":
            return RnnHead(weights, linear=linear)


def markov_shapes(config: DSparkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the head's tensors."""
    rank, hidden = config.markov_rank, config.hidden_size
    if config.markov is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        f"{_PREFIX}markov_w1.weight": (config.vocab_size, rank),
        f"{_PREFIX}markov_w2.weight": (config.draft_vocab_size, rank),
    }
    if config.markov == "gated":
        shapes |= {f"{_PREFIX}gate_proj.weight": (rank, hidden + rank), f"{_PREFIX}gate_proj.bias": (rank,)}
    if config.markov == "rnn":
        joint = f"{_PREFIX}joint_proj."
        shapes |= {f"{joint}weight": (3 * rank, 2 * rank + hidden), f"{joint}bias": (3 * rank,)}
    return shapes
