"""From a config, a loaded target and rows to a trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark_batch.drafters.dspark.checkpoint import WEIGHTS_FILE, expected_shapes, read_config
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.models.loader import resolve_dtype
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.initial import draft_vocabulary, drafter_config, initial_tensors
from dspark_batch.training.sequences import TokenRow
from dspark_batch.training.student import Student
from dspark_batch.training.teacher import LoadedTeacher
from dspark_batch.training.trainer import Trainer


def make_trainer(
    config: TrainConfig, loaded: LoadedTeacher, rows: Sequence[TokenRow], *, folder: Path, identity: str
) -> Trainer:
    """A new trainer, or one that goes on from the state in ``folder``.

    Raises:
        ConfigError: the drafter section does not fit the target or the drafter to start from.
        ModelError, OutputError: that drafter, or the saved state, cannot be read.
    """
    teacher = loaded.teacher
    if config.start_from is None:
        shape = drafter_config(
            config.drafter, teacher.spec, rope=teacher.rope_fields, rows=rows, fingerprint=loaded.fingerprint
        )
        token_ids = draft_vocabulary(
            rows, vocab_size=shape.vocab_size, draft_vocab_size=config.drafter.draft_vocab_size
        )
        source = loaded.folder if config.drafter.init == "target" else None
        tensors: Mapping[str, Tensor] = initial_tensors(shape, teacher.spec, folder=source, seed=config.optimize.seed)
    else:
        shape, tensors, token_ids = trained_drafter(Path(config.start_from).expanduser(), loaded.fingerprint)
    student = Student(
        shape,
        tensors,
        teacher,
        token_ids=token_ids,
        max_tokens=config.optimize.max_sequence_tokens,
        dtype=resolve_dtype(config.run.train_dtype, teacher.device),
    )
    return Trainer(student, teacher, rows, config.optimize, folder=folder, identity=identity)


def trained_drafter(folder: Path, fingerprint: str) -> tuple[DSparkConfig, dict[str, Tensor], Tensor | None]:
    """A drafter in the DeepSpec layout that training can go on from: its shape, tensors and draft vocabulary.

    Raises:
        ConfigError: it was made for another target or has no sequential head, or tensors of its own are missing.
        ModelError: its files cannot be read.
    """
    config = read_config(folder)
    if config.target_fingerprint != fingerprint:
        raise ConfigError(
            [Problem("start_from", f"{folder} was trained for another target, or does not say for which")]
        )
    stored = load_file(folder / WEIGHTS_FILE)
    missing = sorted(expected_shapes(config).keys() - stored.keys())
    if missing or config.markov is None or not config.sample_from_anchor:
        what = f"lacks {', '.join(missing[:3])}" if missing else "is no DSpark drafter"
        raise ConfigError([Problem("start_from", f"{folder} {what}; give a drafter that was trained here")])
    token_ids = stored["d2t"].long() + torch.arange(config.draft_vocab_size) if config.is_reduced else None
    return config, {name: stored[name].float() for name in expected_shapes(config)}, token_ids
