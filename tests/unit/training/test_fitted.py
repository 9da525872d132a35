"""First weights by least squares: heads look where they should, and the first drafts are those of the fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from dspark_batch.drafters.dspark.checkpoint import expected_shapes
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.errors import ConfigError
from dspark_batch.testing.tiny_training import random_rows, tiny_teacher
from dspark_batch.training import fitted as fitted_module
from dspark_batch.training.config import DrafterSection
from dspark_batch.training.fitted import fitted_tensors
from dspark_batch.training.initial import drafter_config, initial_tensors
from dspark_batch.training.packing import Piece, pack
from dspark_batch.training.student import Student
from dspark_batch.training.teacher import LoadedTeacher, TaughtRows

ROWS = random_rows([(3, 37)] * 60)
HIDDEN, HEADS, DIM = 96, 6, 16


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedTeacher:
    folder: Path = tmp_path_factory.mktemp("target")
    return tiny_teacher(folder, hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=DIM)


def shape_of(loaded: LoadedTeacher, **fields: object) -> DSparkConfig:
    values = {"num_layers": 2, "block_size": 3, "taps": [0, 1], "draft_vocab_size": None, "markov_rank": 4, **fields}
    teacher, section = loaded.teacher, DrafterSection.model_validate(values)
    return drafter_config(section, teacher.spec, rope=teacher.rope_fields, rows=ROWS, fingerprint="f")


def fitted(loaded: LoadedTeacher, config: DSparkConfig) -> dict[str, torch.Tensor]:
    taught = TaughtRows(loaded.teacher, ROWS, taps=config.taps, limit_bytes=2**24)
    start = initial_tensors(config, loaded.teacher.spec, folder=loaded.folder, seed=0)
    return fitted_tensors(config, loaded.teacher, ROWS, taught, start=start)


def first_layer_alone(loaded: LoadedTeacher, config: DSparkConfig) -> Student:
    """A student whose output is what its first layer adds up to, before any norm's weight."""
    tensors = fitted(loaded, config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.1.{name}.weight"] = torch.zeros_like(tensors[f"layers.1.{name}.weight"])
    tensors["norm.weight"] = torch.ones_like(tensors["norm.weight"])
    return Student(config, tensors, loaded.teacher, token_ids=None, max_tokens=64, dtype=torch.float32)


@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_the_first_layer_gives_nearly_what_the_targets_last_layer_reads(
    loaded: LoadedTeacher, num_kv_heads: int
) -> None:
    config = shape_of(loaded, num_kv_heads=num_kv_heads)
    student = first_layer_alone(loaded, config)
    assert {name: tuple(p.shape) for name, p in student.parameters.items()} == expected_shapes(config)
    batch = pack([Piece(r, np.arange(4, 30, 5)) for r in (1, 7)], ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=config.taps)
    hidden = student.hidden_of(batch, taught)[:, 0].detach()
    wanted = torch.cat([t.features[batch.anchors[:6], HIDDEN:] for t in taught])
    bare = loaded.teacher.embed(torch.from_numpy(batch.anchor_ids))
    gap_before = 1 - float(cosine_similarity(bare, wanted).mean())
    gap_after = 1 - float(cosine_similarity(hidden, wanted).mean())
    assert gap_after < 0.8 * gap_before


def test_context_heads_score_the_nearest_context_token_highest() -> None:
    pattern = fitted_module._pattern(64, fitted_module._NEAR)
    frequencies = 100_000.0 ** (-torch.arange(32) / 32)
    distances = torch.arange(1, 400)
    # The product of two such heads of size one, rotated: a sum of cosines of the distance.
    scores = (pattern[:32] ** 2 * torch.cos(distances[:, None] * frequencies)).sum(1) / (pattern**2).sum()
    weights = torch.softmax(40.0 * scores, dim=0)
    assert float(weights[0]) > 0.9
    # Later slots are further from the context; each still sees its end best.
    for slot in range(1, 5):
        assert int(scores[slot:].argmax()) == 0


def test_a_direction_tells_two_kinds_of_inputs_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    some, others = torch.randn(2, 200, 24, generator=generator)
    found = fitted_module._telling(yes=(some + 0.7,), no=(others - 0.7, others[:20]))
    assert float(found.norm()) == pytest.approx(1.0)
    assert float(((some + 0.7) @ found > 0).float().mean()) > 0.95
    assert float(((others - 0.7) @ found < 0).float().mean()) > 0.95


def test_low_rank_factors_are_exact_at_full_rank_and_lose_little_of_what_is_large() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, solution = torch.randn(300, 12, generator=generator), torch.randn(12, 9, generator=generator)
    solution[:, 3:] *= 0.01
    spread = torch.ones(9)
    for rank, error in ((9, 1e-4), (3, 0.05), (11, 1e-4)):
        down, up = fitted_module._low_rank(solution, inputs, spread, rank=rank)
        assert (down.shape, up.shape) == ((rank, 12), (9, rank))
        assert float((inputs @ (up @ down).T - inputs @ solution).norm()) <= error * float((inputs @ solution).norm())


@pytest.mark.parametrize(
    ("fields", "message"), [({"num_layers": 1}, "num_layers"), ({"taps": [0]}, "must have 1 among them")]
)
def test_shapes_that_cannot_be_fitted_are_refused(
    loaded: LoadedTeacher, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(loaded, shape_of(loaded, num_kv_heads=2, **fields))


def test_key_heads_that_do_not_divide_the_targets_are_refused(loaded: LoadedTeacher) -> None:
    with pytest.raises(ConfigError, match="num_kv_heads"):
        shape_of(loaded, num_kv_heads=5)


def test_shared_key_heads_are_copied_to_their_query_heads(loaded: LoadedTeacher) -> None:
    many, few = shape_of(loaded, num_kv_heads=6), shape_of(loaded)
    copied, shared = (
        initial_tensors(c, loaded.teacher.spec, folder=loaded.folder, seed=0)["layers.1.self_attn.v_proj.weight"]
        for c in (many, few)
    )
    heads = shared.view(few.num_kv_heads, DIM, HIDDEN)
    assert torch.equal(copied.view(6, DIM, HIDDEN), heads.repeat_interleave(6 // few.num_kv_heads, dim=0))
