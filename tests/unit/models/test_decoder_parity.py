"""Logits of the lean decoder against transformers, in float32, for every family and variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_batch.models.decoder import Decoder
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.native import NativeDecoder
from dspark_batch.testing.flat import FlatDriver
from dspark_batch.testing.tiny import edit_config, load_tiny, save_tiny_checkpoint

TOLERANCE = 1e-4
LENGTHS = (1, 7, 23, 41, 64)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 6}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 20}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama-rope-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-yarn-mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "llama-rope-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama-rope-yarn-ramp": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False}},
    ),
    "mistral": ("mistral", {}),
    "mistral-sliding": ("mistral", {"sliding_window": 11}),
    "mistral-head-dim": ("mistral", {"head_dim": 10, "sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-sliding": ("qwen2", {**SLIDING, "tie_word_embeddings": True}),
    "qwen2-layer-types": (
        "qwen2",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-sliding": ("qwen3", SLIDING),
}
NATIVE_WIDTHS = {"head_dim": 16, "hidden_size": 48}
"""Widths that the native kernels know; the other variants run on torch."""
NATIVE_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral-sliding": ("mistral", {"sliding_window": 11}),
    "qwen2-sliding": ("qwen2", {**SLIDING, "rope_parameters": YARN}),
    "qwen3-sliding": ("qwen3", {**SLIDING, "attention_bias": True}),
}
VARIANTS |= {f"native-{name}": (family, more | NATIVE_WIDTHS) for name, (family, more) in NATIVE_VARIANTS.items()}
SCHEDULES = {
    "prefill": [[64]],
    "chunked prefill": [[3, 5, 8, 2], [13, 1, 4, 7]],
    "decode one by one": [[1]],
    "prefill, verify and decode side by side": [[11, 4, 1], [1, 29, 5], [2, 1, 17]],
}


def random_tokens(*lengths: int, vocab_size: int = 272, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def reference_logits(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_however_the_tokens_are_sliced(variant: str, checkpoint: Callable[..., Path]) -> None:
    family, overrides = VARIANTS[variant]
    folder = checkpoint(family, **overrides)
    sequences = random_tokens(*LENGTHS)
    expected = reference_logits(folder, sequences)
    target = load_tiny(folder).target
    for name, schedule in SCHEDULES.items():
        driver = FlatDriver(target)
        rows = [driver.add(ids) for ids in sequences]
        driver.finish(rows, schedule)
        for row, logits in zip(rows, expected, strict=True):
            worst = (torch.stack(row.logits) - logits).abs().max()
            assert worst < TOLERANCE, f"{name}: {worst} with {len(row.token_ids)} tokens"
            target.kv.free(row.slot)
    assert target.kv.num_free_tokens == target.kv.num_total_tokens


@pytest.mark.parametrize("variant", ["llama", "qwen2-layer-types", "mistral-sliding", "qwen3", "native-qwen2-sliding"])
def test_a_shared_prefix_gives_the_same_logits_as_an_own_one(variant: str, checkpoint: Callable[..., Path]) -> None:
    family, overrides = VARIANTS[variant]
    folder = checkpoint(family, **overrides)
    (prefix,) = random_tokens(13)
    sequences = [prefix + tail for tail in random_tokens(1, 5, 22, seed=1)]
    expected = reference_logits(folder, sequences)
    target = load_tiny(folder).target
    driver = FlatDriver(target)
    shared = driver.add(prefix)
    driver.finish([shared], [[64]])
    rows = [
        driver.add(ids, prefix=shared, prefix_len=length) for ids, length in zip(sequences, (13, 13, 7), strict=True)
    ]
    target.kv.free(shared.slot)
    other = driver.add(random_tokens(17, seed=2)[0])
    driver.finish([*rows, other], [[3, 1], [1, 9]])
    for row, logits in zip(rows, expected, strict=True):
        assert (torch.stack(row.logits) - logits).abs().max() < TOLERANCE
    for row in (*rows, other):
        target.kv.free(row.slot)
    assert target.kv.num_free_tokens == target.kv.num_total_tokens


def test_models_of_native_widths_run_on_the_native_kernels_where_there_are_any(
    checkpoint: Callable[..., Path],
) -> None:
    family, overrides = VARIANTS["native-llama-tied"]
    folder = checkpoint(family, **overrides)
    assert isinstance(load_tiny(folder).target.decoder, NativeDecoder if load_kernels() else Decoder)
    assert isinstance(load_tiny(folder, attention="cpu").target.decoder, Decoder)


@pytest.mark.parametrize("widths", [{}, NATIVE_WIDTHS], ids=["torch", "native"])
@pytest.mark.parametrize("taps", [(-1,), (0,), (1, -1), (2,), (-1, 0, 1, 2)], ids=lambda taps: ",".join(map(str, taps)))
def test_features_are_the_outputs_of_the_tapped_layers(
    taps: tuple[int, ...], widths: dict[str, int], checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint("llama", **widths)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _i, out, k=index: outputs.update({k: out}))
    sequences = random_tokens(9, 14)
    driver = FlatDriver(load_tiny(folder).target, taps=taps)
    rows = [driver.add(ids) for ids in sequences]
    driver.finish(rows, [[4, 2], [1, 5]])
    for row, ids in zip(rows, sequences, strict=True):
        with torch.inference_mode():
            outputs[-1] = model.model.embed_tokens(torch.tensor([ids]))
            logits = model(torch.tensor([ids])).logits[0]
        expected = torch.cat([outputs[k][0] for k in taps], dim=-1)
        torch.testing.assert_close(torch.stack(row.features), expected, atol=1e-4, rtol=1e-4)
        assert (torch.stack(row.logits) - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_the_old_spelling_of_rope_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    rope = dict(VARIANTS[f"llama-rope-{name}"][1]["rope_parameters"])
    folder = save_tiny_checkpoint(tmp_path, "llama", rope_parameters=rope, tokenizer=False)
    sequences = random_tokens(37)
    expected = reference_logits(folder, sequences)
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    edit_config(folder, rope_parameters=..., rope_theta=theta, rope_scaling={"type": kind, **rope})
    driver = FlatDriver(load_tiny(folder).target)
    row = driver.add(sequences[0])
    driver.finish([row], [[64]])
    assert (torch.stack(row.logits) - expected[0]).abs().max() < TOLERANCE
