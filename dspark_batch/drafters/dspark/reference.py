"""The slow float64 oracle of the drafter: one row, dense masks, no cache, straight from the checkpoint's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.drafters.dspark.config import DSparkConfig


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceDraft:
    """token_ids: γ target tokens. logits: [γ, Vd]; confidence_logits: [γ] or None; both float64."""

    token_ids: list[int]
    logits: Tensor
    confidence_logits: Tensor | None


def reference_draft(
    config: DSparkConfig,
    tensors: Mapping[str, Tensor],
    *,
    embedding: Tensor,
    head: Tensor,
    features: Tensor,
    anchor: int,
    token_ids: Sequence[int] | None = None,
) -> ReferenceDraft:
    """Draft greedily after ``features`` [n, taps*H] of positions 0 .. n-1 and the anchor at position n.

    embedding: [V, H]. head: [Vd, H], the rows of the tokens that can be drafted. token_ids: [Vd], those tokens; None
    for the whole vocabulary. Positions are rotated with the default RoPE of ``config.rope["rope_theta"]``.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = _blocks(config, w, embedding.double(), features.double(), anchor)[config.first_slot :]
    drafted: list[int] = []
    rows: list[Tensor] = []
    confidences: list[Tensor] = []
    previous, state = anchor, torch.zeros(config.markov_rank, dtype=torch.float64)
    for h in hidden:
        logits = head.double() @ h
        before = None
        if config.markov is not None:
            before = w["markov_head.markov_w1.weight"][previous]
            bias, state = _markov(config, w, before, h, state)
            logits = logits + bias
        if config.has_confidence:
            x = torch.cat((h, before)) if config.confidence_with_markov and before is not None else h
            bias = w.get("confidence_head.proj.bias", torch.zeros(1, dtype=torch.float64))
            confidences.append(w["confidence_head.proj.weight"][0] @ x + bias[0])
        best = int(logits.argmax())
        previous = best if token_ids is None else token_ids[best]
        drafted.append(previous)
        rows.append(logits)
    return ReferenceDraft(drafted, torch.stack(rows), torch.stack(confidences) if confidences else None)


def _markov(
    config: DSparkConfig, w: Mapping[str, Tensor], before: Tensor, h: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    w2 = w["markov_head.markov_w2.weight"]
    if config.markov == "vanilla":
        return w2 @ before, state
    if config.markov == "gated":
        x = torch.cat((h, before))
        gate = (w["markov_head.gate_proj.weight"] @ x + w["markov_head.gate_proj.bias"]).sigmoid()
        return w2 @ (gate * before), state
    joint = w["markov_head.joint_proj.weight"] @ torch.cat((state, before, h)) + w["markov_head.joint_proj.bias"]
    rank = config.markov_rank
    gate = joint[:rank].sigmoid()
    state = gate * state + (1 - gate) * joint[rank : 2 * rank].tanh()
    return w2 @ joint[2 * rank :].tanh(), state


def _blocks(config: DSparkConfig, w: Mapping[str, Tensor], embedding: Tensor, features: Tensor, anchor: int) -> Tensor:
    """[B, H], the final-norm output of every slot."""
    n, size = features.shape[0], config.block_size
    context = _norm(features @ w["fc.weight"].T, w["hidden_norm.weight"], config)
    x = embedding[[anchor] + [config.mask_token_id] * (size - 1)]
    for layer, window in enumerate(config.layer_windows):
        p = f"layers.{layer}."
        y = _norm(x, w[f"{p}input_layernorm.weight"], config)
        x = x + _attention(config, w, f"{p}self_attn.", y, context, _visible(config, n, window))
        y = _norm(x, w[f"{p}post_attention_layernorm.weight"], config)
        gated = torch.nn.functional.silu(y @ w[f"{p}mlp.gate_proj.weight"].T) * (y @ w[f"{p}mlp.up_proj.weight"].T)
        x = x + gated @ w[f"{p}mlp.down_proj.weight"].T
    return _norm(x, w["norm.weight"], config)


def _visible(config: DSparkConfig, n: int, window: int | None) -> Tensor:
    """[B, n + B] bool: which positions a slot sees."""
    size = config.block_size
    key, query = torch.arange(n + size)[None, :], torch.arange(n, n + size)[:, None]
    context = key < n if window is None else (key < n) & (key >= n - window)
    block = (key >= n) & (key <= query) if window is not None and config.causal_windows else key >= n
    return context | block.expand(size, -1)


def _attention(
    config: DSparkConfig, w: Mapping[str, Tensor], p: str, y: Tensor, context: Tensor, visible: Tensor
) -> Tensor:
    n, d = context.shape[0], config.head_dim
    both = torch.cat((context, y))
    q = _norm((y @ w[f"{p}q_proj.weight"].T).view(-1, config.num_heads, d), w[f"{p}q_norm.weight"], config)
    k = _norm((both @ w[f"{p}k_proj.weight"].T).view(-1, config.num_kv_heads, d), w[f"{p}k_norm.weight"], config)
    v = (both @ w[f"{p}v_proj.weight"].T).view(-1, config.num_kv_heads, d)
    q, k = _rotated(config, q, n), _rotated(config, k, 0)
    heads = []
    for head in range(config.num_heads):
        at = head // (config.num_heads // config.num_kv_heads)
        scores = (q[:, head] @ k[:, at].T / math.sqrt(d)).masked_fill(~visible, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, at])
    return torch.cat(heads, dim=1) @ w[f"{p}o_proj.weight"].T


def _rotated(config: DSparkConfig, x: Tensor, start: int) -> Tensor:
    """[P, heads, D] at positions start .. start+P-1."""
    theta, half = config.rope["rope_theta"], config.head_dim // 2
    assert isinstance(theta, float | int), "the oracle knows the default RoPE only"
    frequencies = float(theta) ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(x.shape[0], dtype=torch.float64) + start)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _norm(x: Tensor, weight: Tensor, config: DSparkConfig) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight
