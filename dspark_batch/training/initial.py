"""What a drafter starts as: its shape from the target's, its vocabulary from the responses, its first weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark_batch.drafters.dspark.checkpoint import expected_shapes
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.weights import read_tensors
from dspark_batch.training.bigrams import bigram_factors
from dspark_batch.training.config import DrafterSection
from dspark_batch.training.sequences import TokenRow

DEFAULT_NUM_TAPS = 3
_STD = 0.02
_BIGRAM_SHARE = 0.5
_LAYER_TENSORS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def spread_taps(num_layers: int, *, num_taps: int = DEFAULT_NUM_TAPS) -> tuple[int, ...]:
    """Layers at even distances from the second to the third last, as the released drafters tap them."""
    last = max(num_layers - 3, 0)
    first = min(1, last)
    return tuple(sorted({round(first + (last - first) * i / max(num_taps - 1, 1)) for i in range(num_taps)}))


def token_counts(rows: Sequence[TokenRow], *, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[V] how often each token occurs in the responses."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in rows:
        counts += np.bincount(row.token_ids[row.prompt_len :], minlength=vocab_size)
    return counts


def draft_vocabulary(rows: Sequence[TokenRow], *, vocab_size: int, draft_vocab_size: int | None) -> Tensor | None:
    """[Vd] int64, increasing: the most frequent response tokens, ties to the lower id; None where all are wanted."""
    if draft_vocab_size is None or draft_vocab_size >= vocab_size:
        return None
    counts = token_counts(rows, vocab_size=vocab_size)
    best = np.argsort(-counts, kind="stable")[:draft_vocab_size]
    return torch.from_numpy(np.sort(best))


def drafter_config(
    section: DrafterSection,
    spec: DecoderSpec,
    *,
    rope: Mapping[str, object],
    rows: Sequence[TokenRow],
    fingerprint: str,
) -> DSparkConfig:
    """The drafter's shape: width, heads and position embeddings are the target's.

    Raises:
        ConfigError: a tap or the mask token does not exist in the target.
    """
    taps = spread_taps(spec.num_layers) if section.taps is None else tuple(sorted(set(section.taps)))
    problems = []
    if not taps or not all(-1 <= tap < spec.num_layers - 1 for tap in taps):
        problems.append(
            Problem(
                "drafter.taps", f"{list(taps)} must lie in -1 .. {spec.num_layers - 2}; the last layer is not tapped"
            )
        )
    mask = section.mask_token_id
    if mask is None:
        counts = token_counts(rows, vocab_size=spec.vocab_size)
        mask = int(spec.vocab_size - 1 - np.argmin(counts[::-1]))
    elif mask >= spec.vocab_size:
        problems.append(Problem("drafter.mask_token_id", f"{mask} is outside the vocabulary of {spec.vocab_size}"))
    num_kv_heads = section.num_kv_heads or spec.num_kv_heads
    if spec.num_heads % num_kv_heads or num_kv_heads % spec.num_kv_heads:
        problems.append(
            Problem(
                "drafter.num_kv_heads",
                f"{num_kv_heads} must be a multiple of the target's {spec.num_kv_heads} and divide its "
                f"{spec.num_heads} heads",
            )
        )
    if problems:
        raise ConfigError(problems)
    reduced = section.draft_vocab_size
    return DSparkConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=section.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=spec.head_dim,
        norm_eps=spec.norm_eps,
        vocab_size=spec.vocab_size,
        draft_vocab_size=spec.vocab_size if reduced is None else min(reduced, spec.vocab_size),
        block_size=section.block_size,
        mask_token_id=mask,
        taps=taps,
        sample_from_anchor=True,
        rope=dict(rope),
        markov=section.markov,
        markov_rank=section.markov_rank,
        has_confidence=True,
        confidence_with_markov=True,
        num_target_layers=spec.num_layers,
        target_fingerprint=fingerprint,
    )


def initial_tensors(
    config: DSparkConfig,
    spec: DecoderSpec,
    *,
    folder: Path | None,
    seed: int,
    rows: Sequence[TokenRow] = (),
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """First weights, float32 on the CPU. folder: the target's, to start from its last layers; None: random.

    From the target: its last layers and final norm; queries and keys, which the drafter normalises per head, keep the
    size that the target's have for inputs of size one; features start as the deepest tapped layer.
    The sequential head starts from the bigrams of ``rows``, at half of their size, since slots know some of it already.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator) for name, shape in expected_shapes(config).items()}
    # The confidence head starts at even odds.
    for name in tensors:
        if name.startswith("confidence_head"):
            tensors[name].zero_()
    tensors |= _sequential(config, tensors, rows, token_ids, generator)
    if folder is not None:
        tensors |= _from_target(config, spec, folder, tensors)
    return tensors


def _sequential(
    config: DSparkConfig,
    tensors: Mapping[str, Tensor],
    rows: Sequence[TokenRow],
    token_ids: Tensor | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The bias by bigrams; without rows, none."""
    w1, w2 = tensors["markov_head.markov_w1.weight"].clone(), tensors["markov_head.markov_w2.weight"]
    rank = config.markov_rank
    if not rows:
        return {"markov_head.markov_w2.weight": torch.zeros_like(w2)}
    columns = draft_columns(config.vocab_size, token_ids)
    seen, some, w2 = bigram_factors(rows, columns=columns, rank=rank, generator=generator)
    w1[seen] = some
    out = {"markov_head.markov_w1.weight": w1, "markov_head.markov_w2.weight": w2 * _BIGRAM_SHARE}
    if config.markov == "rnn":
        joint = tensors["markov_head.joint_proj.weight"].clone()
        joint[2 * rank :, rank : 2 * rank] += torch.eye(rank)
        out["markov_head.joint_proj.weight"] = joint
    return out


def draft_columns(vocab_size: int, token_ids: Tensor | None) -> Tensor:
    """[V] int64: the draft column of each token of the target, -1 without one. token_ids: [Vd]; None for all."""
    if token_ids is None:
        return torch.arange(vocab_size)
    columns = torch.full((vocab_size,), -1, dtype=torch.int64)
    return columns.index_copy_(0, token_ids.cpu(), torch.arange(len(token_ids)))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * _STD


def _from_target(
    config: DSparkConfig, spec: DecoderSpec, folder: Path, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    number = min(config.num_layers, spec.num_layers)
    sources = range(spec.num_layers - number, spec.num_layers)
    names = [f"model.layers.{s}.{part}.weight" for s in sources for part in _LAYER_TENSORS]
    norms = [f"model.layers.{s}.self_attn.{part}_norm.weight" for s in sources for part in "qk"] if spec.qk_norm else []
    found = {name: t.float() for name, t in read_tensors(folder, [*names, *norms, "model.norm.weight"]).items()}
    out = {"norm.weight": found["model.norm.weight"]}
    for layer, source in enumerate(sources):
        for part in _LAYER_TENSORS:
            out[f"layers.{layer}.{part}.weight"] = found[f"model.layers.{source}.{part}.weight"]
        for part in ("k_proj", "v_proj"):
            name = f"layers.{layer}.self_attn.{part}.weight"
            out[name] = _shared_heads(out[name], config, num_copies=config.num_kv_heads // spec.num_kv_heads)
        for part in "qk":
            name = f"model.layers.{source}.self_attn.{part}_norm.weight"
            size = found[name] if spec.qk_norm else _head_size(out, layer, part, config)
            out[f"layers.{layer}.self_attn.{part}_norm.weight"] = size
    out["hidden_norm.weight"] = torch.stack([out[f"layers.{i}.input_layernorm.weight"] for i in range(number)]).mean(0)
    fc = tensors["fc.weight"].clone() * 0.1
    fc[:, -config.hidden_size :] += torch.eye(config.hidden_size)
    return out | {"fc.weight": fc}


def _shared_heads(weight: Tensor, config: DSparkConfig, *, num_copies: int) -> Tensor:
    """Key or value heads that several query heads share, as one head for each part of those."""
    heads = weight.view(-1, config.head_dim, weight.shape[1])
    return heads.repeat_interleave(num_copies, dim=0).flatten(0, 1)


def _head_size(out: Mapping[str, Tensor], layer: int, part: str, config: DSparkConfig) -> Tensor:
    """[D]: the root mean square over heads of what q or k is made of, for a normalised input of size one."""
    weight = out[f"layers.{layer}.self_attn.{part}_proj.weight"] * out[f"layers.{layer}.input_layernorm.weight"]
    per_dim = weight.pow(2).sum(1).view(-1, config.head_dim).mean(0)
    return torch.full((config.head_dim,), math.sqrt(float(per_dim.mean())))
