"""Tiny targets, rows and students for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.job.config import ModelSection
from dspark_batch.testing.tiny import save_tiny_checkpoint
from dspark_batch.testing.tiny_drafter import random_drafter
from dspark_batch.training.config import DrafterSection
from dspark_batch.training.initial import draft_vocabulary, drafter_config
from dspark_batch.training.sequences import TokenRow, token_row
from dspark_batch.training.student import Student
from dspark_batch.training.teacher import LoadedTeacher, load_teacher


def random_rows(sizes: list[tuple[int, int]], *, vocab_size: int = 256, seed: int = 0) -> list[TokenRow]:
    """Rows of random tokens; sizes: (prompt tokens, response tokens) of each."""
    random = np.random.default_rng(seed)
    return [
        token_row(f"r{i}", random.integers(0, vocab_size, p).tolist(), random.integers(0, vocab_size, r).tolist())
        for i, (p, r) in enumerate(sizes)
    ]


def tiny_teacher(
    folder: Path, *, family: str = "llama", max_tokens: int = 64, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LoadedTeacher:
    """The teacher of a tiny random checkpoint, which is written to ``folder``."""
    path = save_tiny_checkpoint(folder, family, **overrides)
    return load_teacher(ModelSection(target=str(path)), max_tokens=max_tokens, dtype=dtype, device=torch.device("cpu"))


def tiny_student(
    loaded: LoadedTeacher,
    rows: list[TokenRow],
    *,
    max_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    **section: Any,
) -> Student:
    """A student with every weight random, the shape as ``section`` (of ``DrafterSection``) says."""
    fields = {"num_layers": 2, "block_size": 3, "taps": [-1, 1], "markov_rank": 5, "draft_vocab_size": 97, **section}
    teacher = loaded.teacher
    config = drafter_config(
        DrafterSection(**fields), teacher.spec, rope=teacher.rope_fields, rows=rows, fingerprint=loaded.fingerprint
    )
    token_ids = draft_vocabulary(rows, vocab_size=config.vocab_size, draft_vocab_size=fields["draft_vocab_size"])
    return Student(
        config,
        _random_tensors(config),
        teacher,
        token_ids=token_ids,
        max_tokens=max_tokens,
        dtype=dtype,
    )


def _random_tensors(config: DSparkConfig) -> dict[str, torch.Tensor]:
    return dict(random_drafter(config, seed=1).tensors)
