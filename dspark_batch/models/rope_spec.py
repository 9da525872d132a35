"""RoPE settings of a checkpoint, in the old (``rope_scaling``) and the new (``rope_parameters``) spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dspark_batch.errors import ModelError, UnsupportedModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of positions. Fields that a kind does not use keep their defaults.

    attention_scale multiplies cosines and sines (YaRN's mscale). original_context: positions seen in pre-training.
    """

    kind: str = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scale: float = 1.0


def rope_spec(config: Mapping[str, object], *, where: str) -> tuple[RopeSpec, int]:
    """The RoPE of a checkpoint and the largest context it serves, in positions.

    A ``dynamic`` RoPE is served up to ``max_position_embeddings`` only: beyond it the frequencies depend on the
    longest sequence seen so far, so keys already in the cache would be wrong and a row would depend on its batch.

    Raises:
        UnsupportedModelError: an unknown kind, or a partial rotary factor.
        ModelError: a missing or senseless value.
    """
    max_positions = _number(config, "max_position_embeddings", where)
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise ModelError(f"{where}: rope_parameters must be a mapping, got {raw!r}")
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise UnsupportedModelError(f"{where}: rope_parameters per layer type are not supported")
    fields: dict[str, object] = {"rope_theta": config.get("rope_theta") or _DEFAULT_THETA, **raw}
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"{where}: rope type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    partial = fields.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"{where}: partial_rotary_factor {partial!r} is not supported, only 1.0")
    theta = _number(fields, "rope_theta", where)
    original = config.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    fields["original_max_position_embeddings"] = original or max_positions
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=_number(fields, "factor", where)), int(max_positions)
    if kind == "llama3":
        return _llama3(fields, theta, where), int(max_positions)
    if kind == "yarn":
        spec = _yarn(fields, theta, max_positions, where)
        return spec, max(int(max_positions), int(spec.factor * spec.original_context))
    return RopeSpec(kind=kind, theta=theta), int(max_positions)


def _llama3(fields: Mapping[str, object], theta: float, where: str) -> RopeSpec:
    return RopeSpec(
        kind="llama3",
        theta=theta,
        factor=_number(fields, "factor", where),
        low_freq_factor=_number(fields, "low_freq_factor", where),
        high_freq_factor=_number(fields, "high_freq_factor", where),
        original_context=int(_number(fields, "original_max_position_embeddings", where)),
    )


def _yarn(fields: Mapping[str, object], theta: float, max_positions: float, where: str) -> RopeSpec:
    original = _number(fields, "original_max_position_embeddings", where)
    factor = max_positions / original if fields.get("factor") is None else _number(fields, "factor", where)
    return RopeSpec(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_context=int(original),
        beta_fast=_number(fields, "beta_fast", where, 32.0),
        beta_slow=_number(fields, "beta_slow", where, 1.0),
        truncate=bool(fields.get("truncate", True)),
        attention_scale=_yarn_attention_scale(fields, factor, where),
    )


def _yarn_attention_scale(fields: Mapping[str, object], factor: float, where: str) -> float:
    """YaRN (arXiv 2309.00071), section 3.4, with the two-mscale variant of DeepSeek-V2."""
    if fields.get("attention_factor") is not None:
        return _number(fields, "attention_factor", where)

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return scale(_number(fields, "mscale", where)) / scale(_number(fields, "mscale_all_dim", where))
    return scale(1.0)


def _number(fields: Mapping[str, object], name: str, where: str, default: float | None = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{where}: {name} is missing (needed for RoPE)")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where}: {name} must be a number above 0, got {value!r}")
    return float(value)
