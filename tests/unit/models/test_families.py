"""Checkpoint configs: what they mean, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_batch.errors import ModelError, UnsupportedModelError
from dspark_batch.models.families import decoder_spec


def config(**fields: Any) -> dict[str, Any]:
    base = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return {name: value for name, value in (base | fields).items() if value is not ...}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types in a mistral"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, "layer type 'linear_attention'"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"here\.json") as caught:
        decoder_spec(config(**fields), where="here.json")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
        ({"max_position_embeddings": ...}, "max_position_embeddings is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor must be a number above 0, got -2"),
        ({"rope_scaling": ["yarn"]}, "rope_parameters must be a mapping"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "must list 4 layers"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be"),
    ],
)
def test_a_senseless_value_is_named_with_its_file(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=r"here\.json") as caught:
        decoder_spec(config(**fields), where="here.json")
    assert named in str(caught.value)


def test_missing_fields_take_the_defaults_of_their_family() -> None:
    assert decoder_spec(config(num_key_value_heads=...)).num_kv_heads == 4
    assert decoder_spec(config(model_type="qwen3")).head_dim == 128
    assert decoder_spec(config()).head_dim == 8
    assert decoder_spec(config()).rope.theta == 10_000.0
    assert decoder_spec(config(model_type="mistral")).sliding_windows == (4096,) * 4


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 9}, (None, None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, (None, None, None, 9)),
        ({"use_sliding_window": True, "sliding_window": 9}, (None, None, None, None)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
            (None, 9, None, 9),
        ),
    ],
)
def test_qwen_windows_follow_their_switches(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert decoder_spec(config(model_type="qwen2", **fields)).sliding_windows == windows


def test_biases_and_norms_belong_to_their_families() -> None:
    qwen2, qwen3 = decoder_spec(config(model_type="qwen2")), decoder_spec(config(model_type="qwen3"))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    biased = decoder_spec(config(attention_bias=True, mlp_bias=True))
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = config(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    assert decoder_spec(old).rope == decoder_spec(new).rope


def test_context_is_stretched_by_yarn_and_capped_for_dynamic() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert decoder_spec(config(rope_scaling=yarn)).max_context == 512
    assert decoder_spec(config(rope_scaling={"rope_type": "dynamic", "factor": 4.0})).max_context == 128
