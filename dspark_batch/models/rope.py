"""Cosine and sine tables of rotary position embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.models.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: [max_context, D/2] in the model's dtype; row p is position p. Pair i rotates dims i and i + D/2."""

    cos: Tensor
    sin: Tensor


def rope_table(
    spec: RopeSpec, *, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    """Angles are computed in float32 on the CPU, as the reference implementation does, and rounded once."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequencies(spec, head_dim=head_dim)
    cos, sin = angles.cos() * spec.attention_scale, angles.sin() * spec.attention_scale
    return RopeTable(cos=cos.to(device, dtype), sin=sin.to(device, dtype))


def inverse_frequencies(spec: RopeSpec, *, head_dim: int) -> Tensor:
    """[D/2] float32, radians per position.

    Sources: linear: position interpolation (arXiv 2306.15595); llama3: the Llama 3.1 release; yarn: arXiv 2309.00071.
    ``dynamic`` equals the default within the context that it is served for.
    """
    periods = spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / periods
    match spec.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / spec.factor
        case "llama3":
            return _llama3(plain, spec)
        case "yarn":
            return _yarn(periods, spec, head_dim)
    raise AssertionError(f"rope kind {spec.kind!r} passed validation")


def _llama3(plain: Tensor, spec: RopeSpec) -> Tensor:
    wavelength = 2 * math.pi / plain
    longest_kept = spec.original_context / spec.high_freq_factor
    shortest_scaled = spec.original_context / spec.low_freq_factor
    share = (spec.original_context / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - share) * plain / spec.factor + share * plain
    scaled = torch.where(wavelength > shortest_scaled, plain / spec.factor, blended)
    return torch.where(wavelength < longest_kept, plain, scaled)


def _yarn(periods: Tensor, spec: RopeSpec, head_dim: int) -> Tensor:
    def dim_of(rotations: float) -> float:
        """The (fractional) dimension that turns ``rotations`` times within the original context."""
        return head_dim * math.log(spec.original_context / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dim_of(spec.beta_fast), dim_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    interpolated_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return interpolated_share / (spec.factor * periods) + (1 - interpolated_share) / periods
