"""The trained computation against the float64 oracle of inference, and that nothing leaks between blocks or rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_batch.drafters.dspark.reference import reference_draft
from dspark_batch.testing.tiny_training import random_rows, tiny_student, tiny_teacher
from dspark_batch.training import attention
from dspark_batch.training.losses import LossWeights
from dspark_batch.training.packing import Piece, pack
from dspark_batch.training.teacher import LoadedTeacher, TaughtRow

ROWS = random_rows([(3, 9), (5, 4), (1, 17)])
PIECES = [Piece(2, np.array([1, 4, 5, 16])), Piece(0, np.array([3, 10])), Piece(1, np.array([5, 6, 7]))]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedTeacher:
    return tiny_teacher(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_the_backbone_equals_the_oracle_of_inference_block_by_block(loaded: LoadedTeacher, markov: str) -> None:
    student = tiny_student(loaded, ROWS, markov=markov)
    batch = pack(PIECES, ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
    hidden = student.hidden_of(batch, taught)
    assert student.token_ids is not None
    head = loaded.teacher.head_rows(student.token_ids)
    embedding = loaded.teacher.embed(torch.arange(student.config.vocab_size))
    block = 0
    for piece, row in zip(PIECES, taught, strict=True):
        for anchor in piece.anchors:
            draft = reference_draft(
                replace(student.config, rope={"rope_theta": 10_000.0}),
                {name: p.detach() for name, p in student.parameters.items()},
                embedding=embedding,
                head=head,
                features=row.features[:anchor],
                anchor=int(ROWS[piece.row].token_ids[anchor]),
                token_ids=student.token_ids.tolist(),
            )
            first = (hidden[block, 0] @ head.T).double()
            bias = draft.logits[0] - first
            _, inputs = student._sequential(
                dict(student.parameters), torch.from_numpy(batch.previous_ids[block : block + 1]), hidden[[block]]
            )
            expected = inputs[0, 0] @ student.parameters["markov_head.markov_w2.weight"].T
            torch.testing.assert_close(bias.float(), expected, atol=1e-4, rtol=1e-3)
            block += 1


def test_a_changed_row_changes_no_other_row_and_no_block_sees_at_or_past_its_anchor(loaded: LoadedTeacher) -> None:
    student = tiny_student(loaded, ROWS)
    batch = pack(PIECES, ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
    before = student.hidden_of(batch, taught).detach()
    features = taught[0].features.clone()
    features[4:] += 3.0
    after = student.hidden_of(batch, [replace(taught[0], features=features), *taught[1:]]).detach()
    changed = (before != after).flatten(1).any(1).tolist()
    # Of the first piece, anchors 1 and 4 end before the change; other rows see nothing of it.
    assert changed == [False, False, True, True, False, False, False, False, False]


def test_dropping_the_other_blocks_leaves_a_block_as_it_is(loaded: LoadedTeacher) -> None:
    student = tiny_student(loaded, ROWS)
    together = pack(PIECES, ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in together.rows], taps=student.config.taps)
    hidden = student.hidden_of(together, taught).detach()
    alone = student.hidden_of(pack([Piece(0, np.array([10]))], ROWS, num_slots=3), [taught[1]]).detach()
    torch.testing.assert_close(hidden[5:6], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_every_parameter_gets_a_gradient_that_finite_differences_confirm(loaded: LoadedTeacher, markov: str) -> None:
    student = tiny_student(loaded, ROWS, markov=markov)
    batch = pack(PIECES, ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
    weights = LossWeights(ce=1.0, distance=0.0, confidence=0.0)
    student.loss(batch, taught, weights=LossWeights()).total.backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in student.parameters.items() if p.grad is None or not p.grad.any()] == []
    for parameter in student.parameters.values():
        parameter.grad = None
    student.loss(batch, taught, weights=weights).total.backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    for name in ("fc.weight", "layers.0.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight"):
        parameter = student.parameters[name]
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator)
        expected = float((parameter.grad * direction).sum())
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(float(student.loss(batch, taught, weights=weights).total.detach()))
                parameter.sub_(direction, alpha=step)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(expected, rel=0.05, abs=2e-3), name


def test_blocks_of_one_slot_leave_the_others_out(loaded: LoadedTeacher) -> None:
    student = tiny_student(loaded, ROWS)
    batch = pack(PIECES, ROWS, num_slots=1)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
    assert student.hidden_of(batch, taught).shape[1] == 1
    loss = student.loss(batch, taught, weights=LossWeights())
    assert loss.acceptance.shape == loss.hits.shape == (3,)
    assert loss.acceptance[0] > 0
    assert not loss.acceptance[1:].any()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_blocks_that_attend_together_do_not_change_the_result(
    loaded: LoadedTeacher, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_student(loaded, ROWS)
    batch = pack(PIECES, ROWS, num_slots=3)
    taught = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
    together = student.hidden_of(batch, taught).detach()
    monkeypatch.setitem(attention._BLOCKS_AT_ONCE, "cpu", at_once)
    torch.testing.assert_close(student.hidden_of(batch, taught).detach(), together, atol=1e-5, rtol=1e-5)


def test_bfloat16_products_stay_close_to_float32(tmp_path: Path) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = tiny_teacher(tmp_path / str(dtype), dtype=dtype)
        student = tiny_student(loaded, ROWS, dtype=dtype)
        batch = pack(PIECES, ROWS, num_slots=3)
        taught: list[TaughtRow] = loaded.teacher.teach([ROWS[r] for r in batch.rows], taps=student.config.taps)
        losses.append(float(student.loss(batch, taught, weights=LossWeights()).total.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
