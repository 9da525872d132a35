"""The confidence head: the chance that a drafted slot is accepted, given that the earlier ones were."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspark_batch.drafters.dspark.config import DSparkConfig

_WEIGHT, _BIAS = "confidence_head.proj.weight", "confidence_head.proj.bias"


class ConfidenceHead:
    """logit = w [h_k; W1[x_{k-1}]] + b in float32, without the Markov part where the checkpoint has it off.

    Source: arXiv 2607.05147. It sees the tokens before slot k only, never the token drafted there.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weight = weights[_WEIGHT].float().squeeze(0)
        self._bias = weights[_BIAS].float() if _BIAS in weights else self._weight.new_zeros(1)

    def logits(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """[..., H] and, where it reads the Markov embedding, [..., r] -> [...] float32, before the sigmoid."""
        width = hidden.shape[-1]
        out = hidden.float() @ self._weight[:width]
        if self._weight.shape[0] > width:
            assert previous is not None, "this confidence head reads the Markov embedding of the token before"
            out = out + previous.float() @ self._weight[width:]
        return out + self._bias

    def __call__(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """Confidences in (0, 1); shapes as in :meth:`logits`."""
        return torch.sigmoid(self.logits(hidden, previous))


def confidence_head(config: DSparkConfig, weights: Mapping[str, Tensor]) -> ConfidenceHead | None:
    """None for a drafter without the head."""
    return ConfidenceHead(weights) if config.has_confidence else None


def confidence_shapes(config: DSparkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the head's tensors; the bias may be left out of a checkpoint."""
    if not config.has_confidence:
        return {}
    width = config.hidden_size + (config.markov_rank if config.confidence_with_markov else 0)
    return {_WEIGHT: (1, width), _BIAS: (1,)}
