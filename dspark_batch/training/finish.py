"""The last stage: accepted lengths, calibration and the card of a trained drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dspark_batch.provenance import device_facts, versions
from dspark_batch.training.calibrate import CalibrationReport, calibrate
from dspark_batch.training.card import Card, DataFacts, throughput, write_card
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.curve import CURVE_FILE, read_curve
from dspark_batch.training.evaluate import Acceptance, Evaluator
from dspark_batch.training.initial import token_counts
from dspark_batch.training.packing import BlockOrder
from dspark_batch.training.prompts import table_prompts
from dspark_batch.training.recording import DraftedRound
from dspark_batch.training.sequences import TokenRow
from dspark_batch.training.trainer import Trainer

HELD_OUT = "held-out"


def evaluate(
    config: TrainConfig, drafter: Path, held_out: Sequence[TokenRow], *, say: Callable[[str], None]
) -> tuple[Evaluator, tuple[Acceptance, ...]]:
    """Accepted lengths on every set of the config and on the held-out prompts, at every temperature.

    Raises:
        ConfigError, InputError: a set cannot be read.
        ModelError, EngineError: as the engine says.
    """
    section = config.evaluate
    evaluator = Evaluator(config.engine_config(), drafter, max_new_tokens=section.max_new_tokens)
    sets = {
        name: table_prompts(source, evaluator.codec, name=name)[: section.num_prompts]
        for name, source in section.sets.items()
    }
    if held_out:
        sets[HELD_OUT] = list(held_out)[: section.num_prompts]
    results = []
    for name, prompts in sets.items():
        for temperature in section.temperatures:
            results.append(evaluator.acceptance(name, prompts, temperature=temperature))
            say(f"{name}, T={temperature:g}: accepted length {results[-1].accepted_length:.3f}")
    return evaluator, tuple(results)


def evaluate_and_calibrate(
    config: TrainConfig, drafter: Path, held_out: Sequence[TokenRow], *, say: Callable[[str], None]
) -> tuple[tuple[Acceptance, ...], CalibrationReport | None]:
    """As :func:`evaluate`, and a calibration that is fitted on the held-out prompts. Raises likewise."""
    evaluator, results = evaluate(config, drafter, held_out, say=say)
    rounds: list[DraftedRound] = []
    for temperature in config.evaluate.temperatures if held_out else ():
        rounds += evaluator.rounds(held_out, temperature=temperature)
    return results, calibrate(rounds, num_slots=evaluator.num_slots)


def expected_survival(acceptance: Sequence[Acceptance]) -> tuple[float, ...]:
    """[K] share of drafts that hold up to and with each position on prompts like those of the training, over all
    temperatures; over all sets where nothing was held out; () where a position was never drafted."""
    results = [a for a in acceptance if a.name == HELD_OUT] or acceptance
    shares = np.array([a.by_position for a in results]).mean(axis=0) if results else np.zeros(0)
    found: list[float] = np.minimum.accumulate(shares).round(4).tolist()
    return tuple(found) if all(found) else ()


def finished_card(
    config: TrainConfig,
    trainer: Trainer,
    rows: Sequence[TokenRow],
    target: str,
    acceptance: tuple[Acceptance, ...],
    calibration: CalibrationReport | None,
    *,
    folder: Path,
) -> None:
    """Write the card of the drafter in ``folder``. target: fingerprint. Raises OSError."""
    student = trainer.student
    points = read_curve(trainer.folder / CURVE_FILE)
    positions, per_s, flops = throughput(points)
    counts = torch.from_numpy(token_counts(rows, vocab_size=student.config.vocab_size))
    known = counts.sum() if student.token_ids is None else counts[student.token_ids.cpu()].sum()
    order = BlockOrder(rows, anchors_per_row=config.optimize.anchors_per_sequence, seed=config.optimize.seed)
    is_cuda = student.device.type == "cuda"
    card = Card(
        target=config.model.target,
        target_fingerprint=target,
        config=config.model_dump(mode="json"),
        data=DataFacts(
            num_rows=len(rows),
            num_prompt_tokens=sum(row.prompt_len for row in rows),
            num_response_tokens=sum(row.num_response_tokens for row in rows),
            num_blocks_per_epoch=order.num_blocks_per_epoch(),
            draft_vocab_coverage=float(known) / max(1, int(counts.sum())),
        ),
        num_parameters=sum(p.numel() for p in student.parameters.values()),
        num_steps=trainer.progress.step,
        num_positions=positions,
        elapsed_s=trainer.progress.elapsed_s,
        positions_per_s=per_s,
        flops_per_position=flops,
        flops_per_s=per_s * flops,
        device=torch.cuda.get_device_name(student.device) if is_cuda else device_facts().cpu,
        versions=versions(),
        last_point=points[-1] if points else None,
        acceptance=acceptance,
        calibration=calibration,
    )
    write_card(folder, card)
