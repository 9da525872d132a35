"""The exception tree. Each class says whether trying again can help (``retriable``) or the process must end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class DSparkBatchError(Exception):
    """Base of every error that the project raises on purpose."""

    retriable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a config: the dotted field, what is wrong with which value, and the file it stands in."""

    field: str
    message: str
    source: str | None = None

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        return f"{where}{self.field}: {self.message}"


class ConfigError(DSparkBatchError):
    """The user's config or command line is wrong. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ModelError(DSparkBatchError):
    """A checkpoint is missing, unreadable or of a kind that is not supported; the message names the reason."""


class UnsupportedModelError(ModelError):
    """The checkpoint uses a feature that the decoder does not have; refused by name rather than run wrongly."""


class InputError(DSparkBatchError):
    """The input table cannot be read as configured (missing file or column, unreadable Parquet, changed files)."""


class OutputError(DSparkBatchError):
    """The output cannot be written or belongs to another run. A failed save is never ignored."""


class FingerprintMismatchError(OutputError):
    """The output path holds a run with another fingerprint; the message names the fields that differ."""


class LeaseLostError(OutputError):
    """Another run of the same job holds the output path, or has taken it over; nothing more may be committed."""


class EngineError(DSparkBatchError):
    """The engine is broken (device fault, failed invariant). The shard stays uncommitted; another process may retry."""

    retriable: ClassVar[bool] = True


class TransientStorageError(DSparkBatchError):
    """A store answered with a fault that usually passes (time-out, throttling)."""

    retriable: ClassVar[bool] = True
