"""From a config, a loaded target and rows to a trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark_batch.drafters.dspark.checkpoint import WEIGHTS_FILE, expected_shapes, read_config
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.models.loader import resolve_dtype
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.features import FeatureFiles
from dspark_batch.training.fitted import fitted_tensors
from dspark_batch.training.initial import draft_vocabulary, drafter_config, initial_tensors
from dspark_batch.training.sequences import TokenRow, rows_with_prompts
from dspark_batch.training.state import STATE_FILE
from dspark_batch.training.student import Student
from dspark_batch.training.teacher import LoadedTeacher, TaughtRows
from dspark_batch.training.trainer import Trainer

GIB = 2**30


def make_trainer(
    config: TrainConfig, loaded: LoadedTeacher, rows: Sequence[TokenRow], *, folder: Path, kept: Path, identity: str
) -> Trainer:
    """A new trainer, or one that goes on from the state in ``folder``. kept: folder of features that were kept.

    Raises:
        ConfigError: the drafter section does not fit the target or the drafter to start from.
        ModelError, OutputError: that drafter, or the saved state, cannot be read.
    """
    # A saved state replaces the first weights, so that they need no care.
    is_new = not (folder / STATE_FILE).is_file()
    taught_rows = rows_with_prompts(rows) if config.optimize.prompt_anchors else rows
    if config.start_from is None:
        shape, token_ids = _shape(config, loaded, rows)
    else:
        shape, tensors, token_ids = trained_drafter(Path(config.start_from).expanduser(), loaded.fingerprint)
    taught = TaughtRows(
        loaded.teacher,
        taught_rows,
        taps=shape.taps,
        limit_bytes=int(config.optimize.feature_cache_gib * GIB),
        files=FeatureFiles(kept),
    )
    if config.start_from is None:
        source = None if config.drafter.init == "random" else loaded.folder
        seen, seed = rows if is_new else (), config.optimize.seed
        tensors = initial_tensors(shape, loaded.teacher.spec, folder=source, seed=seed, rows=seen, token_ids=token_ids)
        if config.drafter.init == "fitted" and is_new:
            tensors = fitted_tensors(shape, loaded.teacher, taught_rows, taught, start=tensors)
    student = Student(
        shape,
        tensors,
        loaded.teacher,
        token_ids=token_ids,
        max_tokens=config.optimize.max_sequence_tokens,
        dtype=resolve_dtype(config.run.train_dtype, loaded.teacher.device),
    )
    return Trainer(student, loaded.teacher, taught_rows, taught, config.optimize, folder=folder, identity=identity)


def _shape(config: TrainConfig, loaded: LoadedTeacher, rows: Sequence[TokenRow]) -> tuple[DSparkConfig, Tensor | None]:
    spec, section = loaded.teacher.spec, config.drafter
    shape = drafter_config(section, spec, rope=loaded.teacher.rope_fields, rows=rows, fingerprint=loaded.fingerprint)
    ids = draft_vocabulary(rows, vocab_size=shape.vocab_size, draft_vocab_size=section.draft_vocab_size)
    return shape, ids


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
