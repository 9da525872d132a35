"""Tiny random drafters in both published layouts, and a target's parts made of two plain matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.checkpoint import (
    EMBEDDING,
    HEAD,
    DrafterWeights,
    expected_shapes,
    save_checkpoint,
)
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.target_parts import LinearOp
from dspark_batch.models.rope import rope_table
from dspark_batch.models.rope_spec import rope_spec
from dspark_batch.tensors import BlockWeights

_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "norm_eps": 1e-6,
    "vocab_size": 61,
    "block_size": 5,
    "mask_token_id": 3,
    "taps": (-1, 1),
    "sample_from_anchor": True,
    "rope": {"rope_theta": 10_000.0, "max_position_embeddings": 256},
    "markov": "vanilla",
    "markov_rank": 7,
    "has_confidence": True,
    "confidence_with_markov": True,
}


def tiny_drafter_config(**overrides: Any) -> DSparkConfig:
    """A drafter config of odd little sizes; ``draft_vocab_size`` follows ``vocab_size`` unless it is given."""
    fields = {**_BASE, **overrides}
    if fields["markov"] is None:
        fields |= {"markov_rank": 0, "confidence_with_markov": False}
    return DSparkConfig(**{"draft_vocab_size": fields["vocab_size"], **fields})


def random_drafter(config: DSparkConfig, *, seed: int = 0, scale: float = 0.15) -> DrafterWeights:
    """Every tensor random, norms around 1, so that leaving one out shows. A reduced vocabulary is an odd selection."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
        for name, shape in expected_shapes(config).items()
    }
    token_ids = None
    if config.is_reduced:
        token_ids = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    return DrafterWeights(config, tensors, token_ids)


def save_deepspec_drafter(folder: Path, weights: DrafterWeights, **copies: Tensor) -> Path:
    """Write float32 in the DeepSpec layout. copies: ``embedding`` and ``head`` of the target, to be stored too."""
    names = {"embedding": EMBEDDING, "head": HEAD}
    tensors = {**weights.tensors, **{names[name]: tensor for name, tensor in copies.items()}}
    save_checkpoint(folder, weights.config, tensors, token_ids=weights.token_ids, dtype=torch.float32)
    return folder


def save_speculators_drafter(folder: Path, weights: DrafterWeights, **overrides: Any) -> Path:
    """Write float32 in the speculators layout; ``overrides`` are top-level fields of its config.json."""
    config = weights.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(weights.tensors)
    if weights.token_ids is not None:
        tensors["d2t"] = weights.token_ids - torch.arange(config.draft_vocab_size)
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, weights.token_ids, True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    window = next((w for w in config.layer_windows if w is not None), None)
    fields: dict[str, Any] = {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark" if config.markov else "dflash",
        "speculators_version": "0.3.0",
        "speculators_config": {"algorithm": "dspark", "verifier": {"name_or_path": "tiny"}},
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in config.taps],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.causal_windows,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov or "vanilla",
        "enable_confidence_head": config.has_confidence,
        "confidence_head_with_markov": config.confidence_with_markov,
        "transformer_layer_config": {
            "model_type": "qwen3",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows],
            **config.rope,
        },
    }
    (folder / "config.json").write_text(json.dumps(fields | overrides))
    return folder


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainParts:
    """Fulfils ``TargetParts`` with an embedding and a head of the caller's, both [V, H], on the CPU."""

    embedding: Tensor
    head: Tensor
    num_layers: int = 4
    max_context: int = 128
    num_kv_tokens: int = 1024
    fingerprint: str = "plain"

    @classmethod
    def random(cls, *, vocab_size: int = 61, hidden_size: int = 48, seed: int = 0, **fields: Any) -> PlainParts:
        generator = torch.Generator().manual_seed(seed)
        embedding, head = torch.randn(2, vocab_size, hidden_size, generator=generator)
        return cls(embedding=embedding, head=head, **fields)

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def ops(self) -> None:
        """None but torch's."""

    def embed(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.head).float()

    def linear(self, weight: Tensor, *, float32: bool = False) -> LinearOp:
        return lambda x: functional.linear(x, weight)

    def block_layers(self, weights: BlockWeights) -> None:
        """None: the layers run one operation after another."""

    def rope_table(
        self, fields: Mapping[str, object], *, head_dim: int, num_positions: int, where: str
    ) -> tuple[Tensor, Tensor]:
        spec, _ = rope_spec(fields, where=where)
        table = rope_table(spec, head_dim=head_dim, num_positions=num_positions, dtype=self.dtype, device=self.device)
        return table.cos, table.sin
