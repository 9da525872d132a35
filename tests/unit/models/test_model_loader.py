"""Loading: every tensor is accounted for, devices and dtypes are chosen, stop tokens are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ModelError
from dspark_batch.models.loader import load_target, resolve_device, resolve_dtype
from dspark_batch.models.weights import expected_shapes
from dspark_batch.testing.flat import FlatDriver
from dspark_batch.testing.tiny import edit_config, load_tiny, save_tiny_checkpoint

CPU = torch.device("cpu")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "tiny", "llama", tokenizer=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"unexpected: model\.extra"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 48)}),
            r"wrong shape: model\.layers\.1\.mlp\.up_proj\.weight is \[3, 48\], not \[80, 48\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}),
            r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=named):
        load_tiny(folder)


def test_many_missing_tensors_are_counted_and_not_all_listed(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(ModelError, match="and 4 more"):
        load_tiny(folder)


def test_old_rotary_buffers_and_a_tied_head_on_disk_are_ignored(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    target = load_tiny(folder).target
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    hidden = torch.randn(2, 48)
    torch.testing.assert_close(target.logits(hidden), hidden @ embedding.T)


def test_a_sharded_checkpoint_gives_the_same_logits(folder: Path) -> None:
    def logits() -> Tensor:
        driver = FlatDriver(load_tiny(folder).target)
        row = driver.add(list(range(11)))
        driver.finish([row], [[64]])
        return torch.stack(row.logits)

    whole, tensors = logits(), load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(), whole)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks the shard b\.safetensors"):
        load_tiny(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors are read"):
        load_tiny(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("{broken")
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_tiny(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 5]}, 7, (3, 5)),
        ({"eos_token_id": 3}, 7, (3,)),
        ({}, [7, 8], (7, 8)),
        (None, 7, (7,)),
        (None, None, ()),
    ],
)
def test_stop_tokens_come_from_the_generation_config_first(
    folder: Path, generation: dict[str, object] | None, config: object, expected: tuple[int, ...]
) -> None:
    edit_config(folder, eos_token_id=config)
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps(generation))
    assert load_tiny(folder).eos_token_ids == expected


def test_a_checkpoint_without_tokenizer_has_no_codec(folder: Path) -> None:
    assert load_tiny(folder).codec is None


def test_context_and_pool_follow_the_config(folder: Path) -> None:
    config = EngineConfig(target=str(folder), device="cpu", dtype="float32", max_context=50, max_concurrency=3)
    target = load_target(config).target
    assert (target.max_context, target.kv.num_total_tokens, target.vocab_size) == (50, 150, 272)
    assert (target.device, target.dtype) == (CPU, torch.float32)


@pytest.mark.parametrize(
    ("heads", "dtype", "reason"),
    [(6, "float32", "width 8 is no multiple of 16"), (3, "float16", "not in float16"), (3, "float32", None)],
)
def test_a_model_that_the_native_kernels_do_not_run_is_told_why(
    heads: int, dtype: str, reason: str | None, checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("llama", num_attention_heads=heads, num_key_value_heads=1)
    load_tiny(folder, dtype=dtype)
    told = [record.getMessage() for record in caplog.records if "do not run this model" in record.getMessage()]
    assert len(told) == (reason is not None)
    assert all(str(reason) in message and "slower" in message and "near ties" in message for message in told)


def test_a_pool_without_room_is_refused(folder: Path) -> None:
    config = EngineConfig(target=str(folder), device="cpu", kv_cache_gib=1e-9)
    with pytest.raises(ModelError, match=r"kv_cache_gib = 1e-09 leaves room for 0 tokens"):
        load_target(config)


def test_the_fingerprint_is_that_of_the_files(folder: Path) -> None:
    before = load_tiny(folder).fingerprint
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert load_tiny(folder).fingerprint != before


def test_devices_and_dtypes_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ModelError, match="no CUDA device"):
        resolve_device("cuda")
    assert resolve_dtype("float16", CPU) == torch.float16
    assert resolve_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_expected_shapes_are_exactly_the_tensors_of_every_family(checkpoint: Callable[..., Path]) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        path = checkpoint(family)
        shapes = {name: tuple(t.shape) for name, t in load_file(path / "model.safetensors").items()}
        assert expected_shapes(load_tiny(path).target.spec) == shapes


def test_an_empty_set_of_wanted_logits_gives_empty_tensors(folder: Path) -> None:
    from dspark_batch.tensors import ForwardBatch, RowSlice

    target = load_tiny(folder).target
    slot = target.kv.allocate(4)
    assert slot is not None
    none = torch.empty(0, dtype=torch.int64)
    out = target.forward(ForwardBatch(torch.arange(4), (RowSlice(slot, 0, 4),), none))
    assert out.hidden.shape == (0, 48)
    assert target.logits(out.hidden).shape == (0, 272)
