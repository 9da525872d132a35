import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_batch.drafters.dspark.checkpoint import DrafterWeights, load_checkpoint, save_checkpoint
from dspark_batch.drafters.dspark.config import MARKOV_KINDS
from dspark_batch.drafters.dspark.target_parts import head_rows
from dspark_batch.errors import ModelError
from dspark_batch.testing.tiny_drafter import (
    PlainParts,
    random_drafter,
    save_deepspec_drafter,
    save_speculators_drafter,
    tiny_drafter_config,
)


def assert_same(read: DrafterWeights, written: DrafterWeights) -> None:
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(read.tensors[name], tensor), name
    assert (read.token_ids is None) == (written.token_ids is None)
    if read.token_ids is not None and written.token_ids is not None:
        assert torch.equal(read.token_ids, written.token_ids)


@pytest.mark.parametrize("draft_vocab_size", [61, 23])
@pytest.mark.parametrize("markov", [*MARKOV_KINDS, None])
def test_what_is_written_is_read_back_from_either_layout(
    tmp_path: Path, markov: str | None, draft_vocab_size: int
) -> None:
    written = random_drafter(tiny_drafter_config(markov=markov, draft_vocab_size=draft_vocab_size))
    parts = PlainParts.random()
    assert_same(load_checkpoint(save_deepspec_drafter(tmp_path / "flat", written), parts), written)
    assert_same(load_checkpoint(save_speculators_drafter(tmp_path / "nested", written), parts), written)


def test_copies_of_the_targets_tensors_may_be_stored_and_are_not_loaded(tmp_path: Path) -> None:
    parts, written = PlainParts.random(), random_drafter(tiny_drafter_config())
    noisy = parts.head + 0.01 * torch.randn_like(parts.head)
    save_deepspec_drafter(tmp_path, written, embedding=parts.embedding, head=noisy)
    assert_same(load_checkpoint(tmp_path, parts), written)


def test_the_head_of_a_reduced_vocabulary_is_kept_where_the_checkpoint_brings_one(tmp_path: Path) -> None:
    parts, written = PlainParts.random(), random_drafter(tiny_drafter_config(draft_vocab_size=23))
    own = torch.randn(23, 48)
    read = load_checkpoint(save_deepspec_drafter(tmp_path, written, head=own), parts)
    assert torch.equal(read.tensors["lm_head.weight"], own)


def test_a_checkpoint_in_shards_is_read(tmp_path: Path) -> None:
    written = random_drafter(tiny_drafter_config())
    save_deepspec_drafter(tmp_path, written)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_checkpoint(tmp_path, PlainParts.random()), written)


def test_a_drafter_for_another_target_is_refused_with_every_mismatch_named(tmp_path: Path) -> None:
    config = tiny_drafter_config(taps=(-1, 3), num_target_layers=9, target_fingerprint="of-another", head_dim=14)
    save_deepspec_drafter(tmp_path, random_drafter(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mask_embedding"] = tensors.pop("fc.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"head_dim": 10}))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(tmp_path, PlainParts.random(vocab_size=67, hidden_size=32, fingerprint="mine"))
    message = str(caught.value)
    for part in (
        "vocab_size is 61, the target has 67",
        "hidden_size is 48, the target has 32",
        "num_target_layers is 9, the target has 4",
        "target_fingerprint is of-another, the target has mine",
        "tapped layers [3]",
        "tensor fc.weight is missing",
        "tensor mask_embedding is unexpected",
        "tensor layers.0.self_attn.q_norm.weight is [14], not [10]",
        "tensor layers.1.self_attn.k_proj.weight is [28, 48], not [20, 48]",
    ):
        assert part in message


def test_copies_of_another_models_embedding_and_head_are_refused(tmp_path: Path) -> None:
    other = PlainParts.random(seed=1)
    save_deepspec_drafter(tmp_path, random_drafter(tiny_drafter_config()), embedding=other.embedding, head=other.head)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is not the target's.*lm_head\.weight is not"):
        load_checkpoint(tmp_path, PlainParts.random(seed=0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids.index_fill(0, torch.tensor([0]), 100), "outside the target's vocabulary"),
        (lambda ids: ids.index_fill(0, torch.tensor([0]), int(ids[1]) + 1), "two of them to one token"),
        (lambda ids: (ids + 1) % 38, "different draft vocabularies"),
    ],
)
def test_a_draft_vocabulary_that_contradicts_itself_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    save_deepspec_drafter(tmp_path, random_drafter(tiny_drafter_config(draft_vocab_size=23)))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["d2t"] = damage(tensors["d2t"])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path, PlainParts.random())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot be read"),
        ("config.json", b"[]", "must hold a mapping"),
        ("model.safetensors", None, "safetensors only"),
        ("model.safetensors", b"damaged", "cannot be read as safetensors"),
    ],
)
def test_an_incomplete_or_damaged_folder_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    save_deepspec_drafter(tmp_path, random_drafter(tiny_drafter_config()))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path, PlainParts.random())


def test_an_incomplete_drafter_is_not_written(tmp_path: Path) -> None:
    weights = random_drafter(tiny_drafter_config(draft_vocab_size=23))
    tensors = {**weights.tensors, "extra": torch.ones(1)}
    del tensors["fc.weight"]
    with pytest.raises(ValueError, match=r"fc\.weight: missing.*extra: unknown.*token_ids"):
        save_checkpoint(tmp_path / "new", weights.config, tensors)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_head_are_exact_whatever_its_layout(dtype: torch.dtype) -> None:
    random = PlainParts.random(vocab_size=71, hidden_size=97)
    parts = PlainParts(embedding=random.embedding.to(dtype), head=random.head.to(dtype))
    index = torch.tensor([5, 70, 0, 13])
    assert torch.equal(head_rows(parts, index), parts.head[index])
