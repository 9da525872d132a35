"""Which drafted tokens to verify: the globally most likely ones, while emitted tokens per second rise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Admitted:
    """mask: [N] which tokens are worth it. num_tokens, num_accepted: their expected numbers. tokens_per_s: of the
    round, the rows' own tokens included."""

    mask: NDArray[np.bool_]
    num_tokens: float
    num_accepted: float
    tokens_per_s: float


def admit(
    survival: Floats,
    *,
    num_rows: int,
    step_seconds: Callable[[Floats], Floats],
    draft_s: float,
    offered: Floats | None = None,
) -> Admitted:
    """The set of tokens with the best rate (num_rows + their survivals) / (draft_s + step_seconds(number of them)).

    survival: [N], within a row nonincreasing and in draft order; of equal survivals the earlier is taken first, so that
    the set is a prefix of every row's draft. step_seconds: extra tokens -> seconds of the step. offered: [N] chance
    that the token will exist at all, where the draft is yet to be made. Every subset size is tried (the cost may have
    steps), so the choice may depend on all tokens: fit for coupled verification and for one-hot drafts, and not for
    sampled drafts under rejection (arXiv 2607.05147, appendix A).
    """
    if offered is None:
        offered = np.ones_like(survival)
    best_first = np.argsort(-survival, kind="stable")
    weights = offered[best_first]
    num_tokens = np.concatenate([[0.0], np.cumsum(weights)])
    num_accepted = np.concatenate([[0.0], np.cumsum(weights * survival[best_first])])
    rates = (num_rows + num_accepted) / (draft_s + step_seconds(num_tokens))
    best = int(rates.argmax())
    mask = np.zeros(len(survival), bool)
    mask[best_first[:best]] = True
    return Admitted(mask, float(num_tokens[best]), float(num_accepted[best]), float(rates[best]))
