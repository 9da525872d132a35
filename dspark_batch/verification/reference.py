"""Slow float64 oracles of the verification rules, on one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def coupled_row(log_probs: NDArray[np.float64], gumbel: NDArray[np.float64], draft: Sequence[int]) -> tuple[int, int]:
    """Accepted length and next token under coupled verification.

    log_probs, gumbel: [len(draft) + 1, V] float64; position j is conditioned on the first j drafted tokens.
    """
    tokens = [int(np.argmax(lp + g)) for lp, g in zip(log_probs, gumbel, strict=True)]
    for j, token in enumerate(draft):
        if token != tokens[j]:
            return j, tokens[j]
    return len(draft), tokens[-1]
