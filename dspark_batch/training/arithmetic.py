"""The floating-point operations that a training step needs, to set its time against."""

from __future__ import annotations

from dspark_batch.drafters.dspark.backbone import backbone_shapes
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.models.families import DecoderSpec

_FORWARD, _TRAINED, _FROZEN = 2, 6, 4
"""Operations per weight and input: a product; a product with both gradients; one with the gradient of its input."""


def drafter_flops(
    config: DSparkConfig, *, num_slots: int, slots_per_block: int, num_context_tokens: int, num_attended: int
) -> int:
    """Of forward and backward. num_attended: pairs of a block and a context token that it sees."""
    shapes = backbone_shapes(config)
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}
    kv = sum(size for name, size in sizes.items() if "k_proj" in name or "v_proj" in name)
    blocks = sum(size for name, size in sizes.items() if name != "fc.weight")
    head = config.draft_vocab_size * config.hidden_size
    w2 = config.draft_vocab_size * config.markov_rank
    per_slot = _TRAINED * (blocks + w2) + _FROZEN * head
    per_token = _TRAINED * (sizes["fc.weight"] + kv)
    width = config.num_layers * config.num_heads * config.head_dim
    attention = _TRAINED * 2 * width * slots_per_block * (num_attended + num_slots)
    return num_slots * per_slot + num_context_tokens * per_token + attention


def target_flops(spec: DecoderSpec, *, num_tokens: int, mean_tokens: float, num_outputs: int) -> int:
    """Of a forward pass over whole rows of ``mean_tokens`` each; ``num_outputs`` positions go through the head."""
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    q = spec.num_heads * spec.head_dim
    layer = spec.hidden_size * (width + q) + 3 * spec.hidden_size * spec.intermediate_size
    attention = spec.num_layers * 2 * q * mean_tokens  # two products over half of the row on average
    head = spec.vocab_size * spec.hidden_size
    return int(_FORWARD * (num_tokens * spec.num_layers * layer + num_outputs * head) + num_tokens * attention)


def head_flops(config: DSparkConfig, *, num_positions: int) -> int:
    """Of the target's logits over the draft vocabulary, which every step computes anew."""
    return _FORWARD * config.draft_vocab_size * config.hidden_size * num_positions
