"""``dspark-batch train``: prompts, responses, training, evaluation, calibration, checkpoint.

Every stage is saved in the output folder, and the same command goes on from the last one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dspark_batch.drafters.dspark.checkpoint import save_checkpoint
from dspark_batch.errors import ConfigError, InputError, Problem
from dspark_batch.models.loader import resolve_device, resolve_dtype
from dspark_batch.provenance import atomic_write_text, fingerprint
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.curve import CURVE_FILE, draw_curve, read_curve
from dspark_batch.training.deadline import Deadline, TimeUpError
from dspark_batch.training.finish import evaluate_and_calibrate, expected_survival, finished_card
from dspark_batch.training.generation import Generator, open_generator
from dspark_batch.training.progress import Progress
from dspark_batch.training.prompts import job_rows, sample_prompts, table_prompts
from dspark_batch.training.responses import generate_responses, missing_parts, part_file
from dspark_batch.training.sequences import TokenRow, read_rows, usable_rows, write_rows
from dspark_batch.training.setup import make_trainer
from dspark_batch.training.teacher import load_teacher
from dspark_batch.training.trainer import Trainer

STAGES = ("prompts", "responses", "train", "evaluate")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a training run keeps what. ``drafter`` is the finished checkpoint."""

    root: Path

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    @property
    def responses(self) -> Path:
        return self.root / "responses"

    @property
    def drafter(self) -> Path:
        return self.root / "drafter"

    @property
    def training(self) -> Path:
        return self.root / "training"


def run_training(config: TrainConfig, *, deadline: Deadline | None = None, last_stage: str = "evaluate") -> bool:
    """Do the stages that are not done, up to ``last_stage``. True once they are; False where the time was up first.

    Raises:
        ConfigError, InputError, ModelError, EngineError, OutputError: as the stages say.
    """
    if last_stage not in STAGES:
        raise ConfigError([Problem("--until", f"must be one of {', '.join(STAGES)}, got {last_stage!r}")])
    wanted = STAGES[: STAGES.index(last_stage) + 1]
    deadline = deadline or Deadline()
    progress = Progress(config.optimize.num_steps)
    folders = Folders(Path(config.output).expanduser())
    if isinstance(config.run.threads, int):
        torch.set_num_threads(config.run.threads)
    _check_settings(config, folders)
    try:
        _data_stages(config, folders, wanted, deadline, progress.say)
        if "train" in wanted:
            _train_stage(config, folders, deadline, progress)
        if "evaluate" in wanted:
            deadline.check()
            _evaluate_stage(config, folders, progress.say)
    except TimeUpError:
        progress.say("the time limit was reached; the same command goes on from here")
        return False
    return True


def _check_settings(config: TrainConfig, folders: Folders) -> None:
    """Data that was generated under other settings is never mixed with new one."""
    fields = config.model_dump(mode="json", include={"model", "prompts", "responses"})
    file = folders.root / "data.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != fields:
        raise ConfigError(
            [
                Problem(
                    "output", f"{folders.root} holds data of other model, prompts or responses settings; choose another"
                )
            ]
        )
    if not file.is_file():
        atomic_write_text(file, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _data_stages(config: TrainConfig, folders: Folders, wanted: Sequence[str], deadline: Deadline, say: Say) -> None:
    prompts = read_rows(folders.prompts) if part_file(folders.prompts, 0).is_file() else None
    is_complete = prompts is not None and not missing_parts(_unanswered(prompts), config.responses, folders.responses)
    if is_complete or (prompts is not None and "responses" not in wanted):
        return
    if prompts is None:
        with open_generator(config.engine_config()) as generator:
            prompts = _all_prompts(config, generator, folders.prompts, deadline)
        write_rows(part_file(folders.prompts, 0), prompts)
        num_answered = len(prompts) - len(_unanswered(prompts))
        say(f"{len(prompts)} distinct prompts, {num_answered} with the responses of a job")
    if "responses" in wanted and missing_parts(_unanswered(prompts), config.responses, folders.responses):
        with open_generator(config.engine_config(), kept_taps=config.responses.kept_taps) as generator:
            generate_responses(
                _unanswered(prompts),
                config.responses,
                generator,
                folder=folders.responses,
                deadline=deadline,
                on_part=lambda done, total, tokens: say(f"responses: part {done} of {total}, {tokens:,} tokens"),
            )


def _all_prompts(config: TrainConfig, generator: Generator, folder: Path, deadline: Deadline) -> list[TokenRow]:
    """Distinct prompts of all sources, mixed and numbered; those of a job come with their responses."""
    section, rows = config.prompts, []
    if section.job is not None:
        rows += job_rows(section.job, generator.codec, eos_token_ids=generator.eos_token_ids)
    if section.table is not None:
        rows += table_prompts(section.table, generator.codec, name="table")
    if section.sampled is not None:
        rows += sample_prompts(section.sampled, generator, folder=folder, deadline=deadline)
    distinct: dict[bytes, TokenRow] = {}
    for row in rows:
        key = row.token_ids.tobytes() if row.num_response_tokens else row.token_ids[: row.prompt_len].tobytes()
        if row.prompt_len:
            distinct.setdefault(key, row)
    if not distinct:
        raise InputError("the prompts section gave no prompt at all; check its sources")
    # Mixed, so that the first parts of the responses are like the rest.
    found = list(distinct.values())
    mixed = [found[i] for i in np.random.default_rng(config.responses.seed).permutation(len(found))]
    return [TokenRow(f"p{i:07d}", row.token_ids, row.prompt_len, row.temperature) for i, row in enumerate(mixed)]


def _unanswered(prompts: Sequence[TokenRow]) -> list[TokenRow]:
    return [row for row in prompts if not row.num_response_tokens]


def split_rows(config: TrainConfig, rows: Sequence[TokenRow]) -> tuple[list[TokenRow], list[TokenRow]]:
    """(training rows, held-out rows): every n-th prompt is held out, with all of its samples."""
    prompts = list(dict.fromkeys(row.token_ids[: row.prompt_len].tobytes() for row in rows))
    count = min(config.evaluate.num_heldout_prompts, len(prompts) // 4)
    chosen = {prompts[i * len(prompts) // count] for i in range(count)} if count else set()
    is_out = [row.token_ids[: row.prompt_len].tobytes() in chosen for row in rows]
    return (
        [row for row, out in zip(rows, is_out, strict=True) if not out],
        [row for row, out in zip(rows, is_out, strict=True) if out],
    )


def training_rows(config: TrainConfig, folders: Folders) -> tuple[list[TokenRow], list[TokenRow]]:
    """(rows to train on, held-out rows) of the stages that are done. Raises InputError where there are none."""
    answered = [row for row in read_rows(folders.prompts) if row.num_response_tokens]
    rows = usable_rows([*answered, *read_rows(folders.responses)], max_tokens=config.optimize.max_sequence_tokens)
    if not rows:
        raise InputError(f"{folders.root} has no response of two tokens to train on; check prompts and responses")
    return split_rows(config, rows)


def open_trainer(config: TrainConfig, folders: Folders, rows: Sequence[TokenRow]) -> tuple[Trainer, str]:
    """A trainer that goes on from the saved state, if any, and the target's fingerprint."""
    device = resolve_device(config.run.device)
    loaded = load_teacher(
        config.model,
        max_tokens=config.optimize.max_sequence_tokens,
        dtype=resolve_dtype(config.model.dtype, device),
        device=device,
    )
    fields = config.model_dump(mode="json", include={"drafter", "optimize", "start_from"})
    fields["optimize"] = {k: v for k, v in fields["optimize"].items() if k not in ("save_every", "feature_cache_gib")}
    digest = fingerprint(
        {"rows": [[row.id, len(row.token_ids)] for row in rows], "target": loaded.fingerprint, **fields}
    )
    trainer = make_trainer(config, loaded, rows, folder=folders.training, kept=folders.responses, identity=digest)
    return trainer, loaded.fingerprint


def _train_stage(config: TrainConfig, folders: Folders, deadline: Deadline, progress: Progress) -> None:
    rows, _ = training_rows(config, folders)
    trainer, _ = open_trainer(config, folders, rows)
    num_tokens = sum(row.num_response_tokens for row in rows)
    if not trainer.is_finished:
        progress.say(f"training on {len(rows)} rows, {num_tokens:,} response tokens, from step {trainer.progress.step}")
    try:
        trainer.run(deadline=deadline, on_point=progress.point)
    finally:
        _draw(folders, progress.say)
    if not (folders.drafter / "config.json").is_file():
        write_drafter(trainer, folders.drafter)


def _draw(folders: Folders, say: Say) -> None:
    points = read_curve(folders.training / CURVE_FILE)
    try:
        if points:
            draw_curve(points, folders.training / "curve.png")
    except ConfigError as error:
        say(f"no picture of the loss curve: {error}")


def write_drafter(
    trainer: Trainer, folder: Path, *, temperatures: tuple[float, ...] = (), survival: tuple[float, ...] = ()
) -> None:
    """The trainer's weights as a checkpoint, with what its evaluation found. Raises OSError."""
    student = trainer.student
    config = replace(student.config, confidence_temperatures=temperatures, expected_survival=survival)
    save_checkpoint(folder, config, student.parameters, token_ids=student.token_ids)


def _evaluate_stage(config: TrainConfig, folders: Folders, say: Say) -> None:
    rows, held_out = training_rows(config, folders)
    trainer, target = open_trainer(config, folders, rows)
    write_drafter(trainer, folders.drafter)
    acceptance, calibration = evaluate_and_calibrate(config, folders.drafter, held_out, say=say)
    temperatures = calibration.temperatures if calibration is not None else ()
    write_drafter(trainer, folders.drafter, temperatures=temperatures, survival=expected_survival(acceptance))
    finished_card(config, trainer, rows, target, acceptance, calibration, folder=folders.drafter)
    say(f"the drafter is in {folders.drafter}")
    for result in acceptance:
        say(json.dumps({k: v for k, v in asdict(result).items() if k != "num_tokens"}))
