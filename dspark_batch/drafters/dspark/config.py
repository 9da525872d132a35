"""Config of a DSpark or DFlash drafter, from either published layout. Standard library only.

**DeepSpec** writes one flat mapping (``architectures: [Qwen3DSparkModel]``). **speculators** nests the draft layers'
config in ``transformer_layer_config`` and counts tapped layers from 1. z-lab's DFlash files are flat, with two fields
in ``dflash_config``. What this drafter does not compute is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from dspark_batch.errors import ModelError, UnsupportedModelError

MarkovKind = Literal["vanilla", "gated", "rnn"]
MARKOV_KINDS: tuple[MarkovKind, ...] = ("vanilla", "gated", "rnn")
MAX_BLOCK_SIZE = 64

_ROPE_FIELDS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
_UNSUPPORTED = ("attention_bias", "quantization_config", "final_logit_softcapping", "draft_adapter_rank", "shift_label")
_DEFAULT_HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DSparkConfig:
    """Shape and features of one drafter.

    block_size: inputs of a block, the anchor and then mask tokens. sample_from_anchor: slot k predicts the token after
    its own position, so a block drafts ``block_size`` tokens; otherwise slot k predicts the token at its position, the
    anchor's slot predicts nothing and a block drafts one token less (DFlash).
    taps: target layers whose outputs are the context features (id k = output of layer k, -1 = embedding output).
    draft_vocab_size: tokens that can be drafted; equal to ``vocab_size`` without a reduced vocabulary.
    markov: the sequential head, or None (DFlash). confidence_with_markov: the confidence head also reads W1[x].
    windows: per draft layer, how many context positions before the anchor are seen; None for all. causal_windows:
    within a block, layers with a window attend only to the left.
    rope: the checkpoint's own fields about position embeddings. num_target_layers, target_fingerprint: of the target
    that it was trained for, where the checkpoint tells. confidence_temperatures: per drafted token, what the confidence
    logits are divided by (STS calibration); () where the checkpoint has none. expected_survival: per drafted token, the
    share of drafts that held up to and with it when the checkpoint was evaluated; () where that is not told.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    sample_from_anchor: bool
    rope: Mapping[str, object]
    markov: MarkovKind | None = None
    markov_rank: int = 0
    has_confidence: bool = False
    confidence_with_markov: bool = False
    windows: tuple[int | None, ...] = ()
    causal_windows: bool = False
    num_target_layers: int | None = None
    target_fingerprint: str | None = None
    confidence_temperatures: tuple[float, ...] = ()
    expected_survival: tuple[float, ...] = ()

    @property
    def num_draft_tokens(self) -> int:
        """γ: tokens that one block drafts."""
        return self.block_size - self.first_slot

    @property
    def first_slot(self) -> int:
        """The first slot that predicts a token: 0, or 1 where the anchor's slot predicts nothing."""
        return 0 if self.sample_from_anchor else 1

    @property
    def is_reduced(self) -> bool:
        return self.draft_vocab_size != self.vocab_size

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * self.num_layers


def dspark_config(config: Mapping[str, object], *, where: str) -> DSparkConfig:
    """Read a checkpoint's config.json, in either layout; ``where`` names the file in errors.

    Raises:
        UnsupportedModelError: the checkpoint has a feature that the drafter does not compute.
        ModelError: fields are missing or senseless; the message names every one of them.
    """
    if "transformer_layer_config" in config or "speculators_model_type" in config:
        return _from_speculators(config, where)
    return _from_deepspec(config, where)


def deepspec_fields(config: DSparkConfig) -> dict[str, object]:
    """The config.json of a drafter in the DeepSpec layout.

    ``sample_from_anchor``, ``draft_vocab_size``, the window fields and ``target_fingerprint`` stand there only where
    they differ from what the layout implies; readers that do not know them see a plain DeepSpec file.
    """
    fields: dict[str, object] = {
        "architectures": ["Qwen3DSparkModel" if config.sample_from_anchor else "Qwen3DFlashModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.taps),
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov or "vanilla",
        "enable_confidence_head": config.has_confidence,
        "confidence_head_with_markov": config.confidence_with_markov,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows],
        **config.rope,
    }
    window = next((w for w in config.layer_windows if w is not None), None)
    optional: dict[str, object] = {
        "num_target_layers": config.num_target_layers,
        "target_fingerprint": config.target_fingerprint,
        "draft_vocab_size": config.draft_vocab_size if config.is_reduced else None,
        "confidence_temperatures": list(config.confidence_temperatures) or None,
        "expected_survival": list(config.expected_survival) or None,
        "sliding_window": window,
        "sliding_window_non_causal": None if window is None else not config.causal_windows,
    }
    return fields | {name: value for name, value in optional.items() if value is not None}


def _from_deepspec(config: Mapping[str, object], where: str) -> DSparkConfig:
    nested = config.get("dflash_config")
    nested = nested if isinstance(nested, Mapping) else {}
    if nested.get("projector_type") is not None:
        raise UnsupportedModelError(
            f"{where}: dflash_config.projector_type {nested['projector_type']!r} is not supported, only the DeepSpec, "
            "speculators and plain DFlash layouts"
        )
    merged = {**config, **nested}
    names = [str(name) for name in _as_list(config.get("architectures"))]
    is_dflash = any("dflash" in name.lower() for name in names)
    if not is_dflash and not any("dspark" in name.lower() for name in names):
        raise UnsupportedModelError(
            f"{where}: architectures {names} is no DSpark or DFlash drafter; expected e.g. ['Qwen3DSparkModel']"
        )
    fields = _Fields(merged, where)
    return _build(fields, fields, taps=fields.ids("target_layer_ids"), anchor_default=not is_dflash)


def _from_speculators(config: Mapping[str, object], where: str) -> DSparkConfig:
    kind = config.get("speculators_model_type")
    if kind not in ("dspark", "dflash"):
        raise UnsupportedModelError(
            f"{where}: speculators_model_type {kind!r} is not supported, only 'dspark' and 'dflash'"
        )
    layers = config.get("transformer_layer_config")
    if not isinstance(layers, Mapping):
        raise ModelError(f"{where}: transformer_layer_config must be a mapping, got {layers!r}")
    top = _Fields({**config, "vocab_size": layers.get("vocab_size")}, where)
    body = _Fields(layers, where, prefix="transformer_layer_config.", problems=top.problems)
    # This layout counts hidden states, of which the embedding output is number 0.
    taps = tuple(layer - 1 for layer in top.ids("aux_hidden_state_layer_ids"))
    return _build(top, body, taps=taps, anchor_default=kind == "dspark")


def _build(top: _Fields, body: _Fields, *, taps: tuple[int, ...], anchor_default: bool) -> DSparkConfig:
    for fields in (top, body):
        fields.refuse(_UNSUPPORTED)
    kind = body.value("model_type", "qwen3")
    if kind != "qwen3":
        raise UnsupportedModelError(
            f"{body.where}: draft layers of model_type {kind!r} are not supported, only 'qwen3'"
        )
    if body.value("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{body.where}: hidden_act {body.value('hidden_act', None)!r} is not supported")
    num_layers, num_heads = body.count("num_hidden_layers"), body.count("num_attention_heads")
    vocab_size = body.count("vocab_size")
    rank = top.count("markov_rank", 0, least=0)
    markov = top.value("markov_head_type", "vanilla") if rank else None
    if markov is not None and markov not in MARKOV_KINDS:
        top.problem(f"markov_head_type must be one of {', '.join(MARKOV_KINDS)}, got {markov!r}")
    has_confidence = top.flag("enable_confidence_head", False)
    with_markov = has_confidence and top.flag("confidence_head_with_markov", False)
    if with_markov and not rank:
        top.problem("confidence_head_with_markov needs a markov_rank above 0")
    config = DSparkConfig(
        hidden_size=body.count("hidden_size"),
        intermediate_size=body.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=body.count("num_key_value_heads", num_heads),
        head_dim=body.count("head_dim", _DEFAULT_HEAD_DIM),
        norm_eps=body.positive("rms_norm_eps", 1e-6),
        vocab_size=vocab_size,
        draft_vocab_size=top.count("draft_vocab_size", vocab_size),
        block_size=top.count("block_size"),
        mask_token_id=top.count("mask_token_id", least=0),
        taps=taps,
        sample_from_anchor=top.flag("sample_from_anchor", anchor_default),
        rope={name: body.config[name] for name in _ROPE_FIELDS if body.config.get(name) is not None},
        markov=next((kind for kind in MARKOV_KINDS if kind == markov), None),
        markov_rank=rank,
        has_confidence=has_confidence,
        confidence_with_markov=with_markov,
        windows=_windows(body, num_layers),
        causal_windows=not top.flag("sliding_window_non_causal", False),
        num_target_layers=top.optional_count("num_target_layers"),
        target_fingerprint=top.optional_text("target_fingerprint"),
        confidence_temperatures=top.positives("confidence_temperatures"),
        expected_survival=top.positives("expected_survival", at_most=1.0),
    )
    _check(config, top)
    top.raise_problems()
    return config


def _check(config: DSparkConfig, fields: _Fields) -> None:
    survival = config.expected_survival
    rules: tuple[tuple[bool, str], ...] = (
        (2 - config.sample_from_anchor <= config.block_size <= MAX_BLOCK_SIZE, f"block_size {config.block_size}"),
        (config.num_heads % config.num_kv_heads == 0, f"{config.num_heads} heads for {config.num_kv_heads} KV heads"),
        (config.head_dim % 2 == 0, f"an odd head_dim {config.head_dim}"),
        (config.mask_token_id < config.vocab_size, f"mask_token_id {config.mask_token_id} outside the vocabulary"),
        (config.draft_vocab_size <= config.vocab_size, f"draft_vocab_size {config.draft_vocab_size} above vocab_size"),
        (
            len(config.confidence_temperatures) in (0, config.num_draft_tokens),
            f"{len(config.confidence_temperatures)} confidence_temperatures for {config.num_draft_tokens} draft tokens",
        ),
        (
            len(survival) in (0, config.num_draft_tokens),
            f"expected_survival of {len(survival)} for {config.num_draft_tokens} draft tokens",
        ),
        (list(survival) == sorted(survival, reverse=True), f"expected_survival {list(survival)} that rises"),
        (list(config.taps) == sorted(set(config.taps)), f"tapped layers {list(config.taps)} that do not increase"),
    )
    for is_fine, what in rules:
        if not is_fine:
            fields.problem(f"{what} makes no sense")


def _windows(body: _Fields, num_layers: int) -> tuple[int | None, ...]:
    types = _as_list(body.value("layer_types", None)) or ["full_attention"] * num_layers
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        body.problem(f"layer_types must name full_attention or sliding_attention for {num_layers} layers, got {types}")
        return ()
    if "sliding_attention" not in types:
        return ()
    window = body.count("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


class _Fields:
    """Typed access to config fields that collects problems instead of stopping at the first."""

    def __init__(
        self, config: Mapping[str, object], where: str, *, prefix: str = "", problems: list[str] | None = None
    ) -> None:
        self.config, self.where, self._prefix = config, where, prefix
        self.problems: list[str] = [] if problems is None else problems

    def problem(self, message: str) -> None:
        self.problems.append(message)

    def raise_problems(self) -> None:
        if self.problems:
            raise ModelError(f"{self.where} is not usable: {'; '.join(self.problems)}")

    def refuse(self, names: tuple[str, ...]) -> None:
        for name in names:
            if self.config.get(name):
                value = self.config[name]
                raise UnsupportedModelError(f"{self.where}: {self._prefix}{name} = {value!r} is not supported")

    def value(self, name: str, default: object) -> object:
        found = self.config.get(name)
        return default if found is None else found

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self._wrong(name, f"a whole number of at least {least}", value)
        return max(least, 1)

    def positive(self, name: str, default: float) -> float:
        value = self.value(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self._wrong(name, "a number above 0", value)
        return default

    def positives(self, name: str, *, at_most: float = math.inf) -> tuple[float, ...]:
        """An optional list of numbers above 0."""
        found = self.config.get(name)
        value = _as_list(found)
        if found is None or (value and all(isinstance(x, int | float) and 0 < x <= at_most for x in value)):
            return tuple(float(cast(float, x)) for x in value)
        self._wrong(name, "a list of numbers above 0" + (f", at most {at_most:g}" if at_most < math.inf else ""), found)
        return ()

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            self._wrong(name, "true or false", value)
        return bool(value)

    def ids(self, name: str) -> tuple[int, ...]:
        value = _as_list(self.config.get(name))
        if value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            return tuple(cast(list[int], value))
        self._wrong(name, "a list of layer numbers", self.config.get(name))
        return ()

    def optional_count(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.count(name)

    def optional_text(self, name: str) -> str | None:
        value = self.config.get(name)
        return None if value is None else str(value)

    def _wrong(self, name: str, rule: str, value: object) -> None:
        found = "it is missing" if value is None else f"got {value!r}"
        self.problem(f"{self._prefix}{name} must be {rule}, {found}")
