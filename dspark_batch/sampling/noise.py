"""Counter-based Gumbel noise: a pure function of (key, position, token id), the same on every device and batch.

The bits are splitmix64 (Steele, Lea and Flood 2014) in wrapping 64-bit integers, so NumPy, torch on any device and C++
agree on every bit. The floating-point part is float64 throughout. All operations are elementwise.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_POSITION_STEP = 0xD1342543DE82EF95
_FRACTION_BITS = 52

MAX_GUMBEL = 36.7369
"""No draw of :func:`gumbel` exceeds this: u is at most 1 - 2**-53."""


def noise_key(seed: int, request_id: str, sample: int, *, stream: str = "draw") -> int:
    """The 64-bit key (as a signed integer) of one sample's noise.

    ``stream`` separates uses whose noise must be independent (a drafter's draws, acceptance tests, residual draws).
    """
    digest = hashlib.blake2b(digest_size=8, person=stream.encode()[:16])
    digest.update(seed.to_bytes(8, "little", signed=True))
    digest.update(sample.to_bytes(8, "little", signed=True))
    digest.update(request_id.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little", signed=True)


def noise_bits(keys: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """52 random bits per element, int64 in [0, 2**52).

    keys and positions: [...] int64. token_ids: [..., M] int64, or [M] for the same tokens everywhere. Gives [..., M].
    """
    state = _mix64(_mix64(keys.clone()) + positions * _signed(_POSITION_STEP))
    hashed = _mix64(state.unsqueeze(-1) + token_ids * _signed(_GOLDEN))
    return _shift_right(hashed, 64 - _FRACTION_BITS)


def uniform(keys: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform numbers strictly between 0 and 1, float64; shapes as in :func:`noise_bits`."""
    # Half a step above 52 bits is exact in float64; with 53 bits the largest value would round to 1.
    return (noise_bits(keys, positions, token_ids).double() + 0.5) * 2.0**-_FRACTION_BITS


def gumbel(keys: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u), float64; shapes as in :func:`noise_bits`."""
    return uniform(keys, positions, token_ids).log_().neg_().log_().neg_()


def argmax_with_noise(scores: Tensor, keys: Tensor, positions: Tensor, *, best: Tensor) -> Tensor:
    """argmax over v of scores[n, v] + gumbel(key_n, position_n, v) over a whole vocabulary, [N] int64.

    scores: [N, V] float64 or float32, finite maximum. best: [N] int64, the argmax of ``scores`` without noise.

    Logarithms are taken only of tokens that can still win, and the result is exact. Let S be the noisy score of
    ``best``. Token v beats it only if -log(u_v) < exp(scores_v - S). As -log(u) >= 1 - u, that needs
    1 - u_v < exp(scores_v - S), a test without logarithms. It is made in float32 with a slack of 1 %, far above the
    rounding of its terms, so it never loses a winner. About 1 / p(best) tokens pass.
    """
    num_rows, vocab_size = scores.shape
    tokens = torch.arange(vocab_size, device=scores.device)
    out = torch.empty_like(best)
    rows_at_once = max(1, (2**18 if scores.device.type == "cpu" else 2**25) // vocab_size)
    for start in range(0, num_rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        out[part] = _argmax_pruned(scores[part], keys[part], positions[part], best[part], tokens)
    return out


def _argmax_pruned(scores: Tensor, keys: Tensor, positions: Tensor, best: Tensor, tokens: Tensor) -> Tensor:
    at_best = best.unsqueeze(-1)
    lead = gumbel(keys, positions, at_best).to(scores.dtype)
    bits = noise_bits(keys, positions, tokens)
    gap = bits.neg_().add_(2**_FRACTION_BITS).float().mul_(2.0**-_FRACTION_BITS)
    # Relative to the best score: at low temperatures the scores themselves are too large for the slack.
    limit = (scores - scores.gather(1, at_best) - lead).float().exp_().mul_(1.01)
    can_win = gap <= limit
    can_win.scatter_(1, at_best, True)
    row, token = can_win.nonzero(as_tuple=True)
    noisy = scores[row, token].double() + gumbel(keys[row], positions[row], token.unsqueeze(-1)).squeeze(-1)
    top = torch.full((scores.shape[0],), -torch.inf, dtype=torch.float64, device=scores.device)
    top.scatter_reduce_(0, row, noisy, "amax")
    # Exact ties go to the lowest token id, as in argmax.
    winner = torch.where(noisy == top[row], token, scores.shape[1])
    return torch.full_like(best, scores.shape[1]).scatter_reduce_(0, row, winner, "amin")


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser; overwrites and returns ``x``."""
    x ^= _shift_right(x, 30)
    x *= _signed(_MIX_1)
    x ^= _shift_right(x, 27)
    x *= _signed(_MIX_2)
    x ^= _shift_right(x, 31)
    return x


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
