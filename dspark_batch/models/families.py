"""From a checkpoint's config.json to what the decoder needs to know. Standard library only.

Whatever the decoder does not compute is refused here by name, so that no checkpoint runs wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark_batch.errors import ModelError, UnsupportedModelError
from dspark_batch.models.rope_spec import RopeSpec, rope_spec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Supported values of ``model_type``."""

_FORBIDDEN = (
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
    "embedding_multiplier",
    "attention_multiplier",
    "num_local_experts",
    "num_experts",
    "no_rope_layers",
    "attention_chunk_size",
)
_MISTRAL_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_FULL_LAYERS = 28
_QWEN3_DEFAULT_HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Shape and features of one decoder.

    sliding_windows: per layer, how many last positions a token sees (itself included); None for all.
    max_context: largest number of positions of one row.
    qk_norm: RMS norm over each query and key head before RoPE (Qwen3).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope: RopeSpec
    sliding_windows: tuple[int | None, ...]
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def num_query_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


def decoder_spec(config: Mapping[str, object], *, where: str = "config.json") -> DecoderSpec:
    """Read a checkpoint's config as transformers reads it.

    Raises:
        UnsupportedModelError: the family or one of its features is not supported; the message names it.
        ModelError: a required field is missing or has no sensible value.
    """
    reader = _Reader(config, where)
    family = reader.family()
    _refuse_features(config, where)
    num_layers, num_heads = reader.count("num_hidden_layers"), reader.count("num_attention_heads")
    num_kv_heads = reader.count("num_key_value_heads", num_heads)
    hidden_size = reader.count("hidden_size")
    head_dim = reader.count("head_dim", _QWEN3_DEFAULT_HEAD_DIM if family == "qwen3" else hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{where}: num_attention_heads {num_heads} is no multiple of {num_kv_heads} key/value heads")
    if head_dim % 2:
        raise UnsupportedModelError(f"{where}: head_dim {head_dim} is odd; RoPE needs an even head_dim")
    rope, max_context = rope_spec(config, where=where)
    attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    return DecoderSpec(
        family=family,
        vocab_size=reader.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=reader.positive("rms_norm_eps", 1e-6),
        max_context=max_context,
        rope=rope,
        sliding_windows=_sliding_windows(reader, family, num_layers),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
    )


def _refuse_features(config: Mapping[str, object], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{where}: hidden_act {activation!r} is not supported, only 'silu'")
    for name in _FORBIDDEN:
        if config.get(name):
            raise UnsupportedModelError(f"{where}: {name} = {config[name]!r} is not supported by this decoder")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{where}: encoder-decoder models are not supported")


def _sliding_windows(reader: _Reader, family: str, num_layers: int) -> tuple[int | None, ...]:
    config = reader.config
    layer_types = config.get("layer_types")
    if family == "llama":
        _refuse_window_in_llama(config, reader.where)
        return (None,) * num_layers
    if family == "mistral":
        if layer_types is not None:
            raise UnsupportedModelError(f"{reader.where}: layer_types in a mistral config are not supported")
        window = reader.optional_count("sliding_window", _MISTRAL_DEFAULT_WINDOW)
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        window = None
    else:
        window = reader.optional_count("sliding_window", _QWEN_DEFAULT_WINDOW)
    if layer_types is None:
        first = reader.optional_count("max_window_layers", _QWEN_DEFAULT_FULL_LAYERS, least=0) or 0
        return tuple(window if i >= first else None for i in range(num_layers))
    return tuple(window if t == "sliding_attention" else None for t in reader.layer_types(layer_types, num_layers))


def _refuse_window_in_llama(config: Mapping[str, object], where: str) -> None:
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types):
        raise UnsupportedModelError(f"{where}: layer_types {layer_types!r} are not supported in a llama config")


class _Reader:
    """Typed access to the fields of a config, with errors that name the field, the value and the file."""

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.config = config
        self.where = where

    def family(self) -> str:
        family = self.config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"{self.where}: model_type {family!r} is not supported; this decoder runs {', '.join(FAMILIES)}"
            )
        assert isinstance(family, str)
        return family

    def count(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.where}: {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.where}: {name} must be a whole number of at least 1, got {value!r}")
        return value

    def optional_count(self, name: str, default: int, *, least: int = 1) -> int | None:
        """``default`` where the field is absent, None where it is null."""
        value = self.config.get(name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelError(f"{self.where}: {name} must be a whole number of at least {least} or null, got {value!r}")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{self.where}: {name} must be a number above 0, got {value!r}")
        return float(value)

    def layer_types(self, value: object, num_layers: int) -> list[str]:
        known = ("full_attention", "sliding_attention")
        if not isinstance(value, list) or len(value) != num_layers:
            raise ModelError(f"{self.where}: layer_types must list {num_layers} layers, got {value!r}")
        for kind in value:
            if kind not in known:
                raise UnsupportedModelError(f"{self.where}: layer type {kind!r} is not supported, only {known}")
        return value
