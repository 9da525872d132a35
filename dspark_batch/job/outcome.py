"""How a run ended: exit code, counts, and the few sample rows shown to the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.batch.results import ShardStats


class ExitCode(IntEnum):
    """Exit status of ``dspark-batch run``."""

    OK = 0
    """All rows are done."""
    FATAL = 1
    """The run could not go on, or was stopped before its end; the same command resumes."""
    BAD_CONFIG = 2
    """The config or the command line is wrong."""
    SOME_ROWS_FAILED = 3
    """Finished; some rows carry an error. ``limits.exit_code_on_failed_rows`` may make it 0."""
    TOO_MANY_FAILED = 4
    """More rows failed than ``limits.max_failed_fraction`` allows."""

    @property
    def is_success(self) -> bool:
        """Whether every row went through, failed rows within the limit included."""
        return self in (ExitCode.OK, ExitCode.SOME_ROWS_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command has to say when it ends: the exit code, and a text for the standard output."""

    code: ExitCode
    text: str

    @property
    def is_success(self) -> bool:
        """See ``ExitCode.is_success``."""
        return self.code.is_success


@dataclass(slots=True)
class Totals:
    """Sums over committed shards. Tokens and rounds count good and failed rows alike."""

    num_shards: int = 0
    num_rows: int = 0
    num_failed_rows: int = 0
    num_retryable_rows: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_rounds: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_cut_samples: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    failing_shards: dict[str, str] = field(default_factory=dict)
    """One shard of each code in ``failures``, where such a row can be looked at."""

    def add(self, stats: ShardStats, *, shard: str) -> None:
        """Count one more committed shard."""
        self.num_shards += 1
        self.num_rows += stats.num_rows
        self.num_failed_rows += stats.num_failed_rows
        self.num_retryable_rows += stats.num_retryable_rows
        self.num_prompt_tokens += stats.num_prompt_tokens
        self.num_generated_tokens += stats.num_generated_tokens
        self.num_rounds += stats.num_rounds
        self.num_drafted_tokens += stats.num_drafted_tokens
        self.num_accepted_tokens += stats.num_accepted_tokens
        self.num_cut_samples += stats.num_cut_samples
        for code, count in stats.num_failed_by_code.items():
            self.failures[code] = self.failures.get(code, 0) + count
            self.failing_shards.setdefault(code, shard)

    @property
    def failed_fraction(self) -> float:
        return self.num_failed_rows / self.num_rows if self.num_rows else 0.0

    @property
    def accepted_length(self) -> float | None:
        """Emitted tokens per round; None before the first round."""
        return self.num_generated_tokens / self.num_rounds if self.num_rounds else None
