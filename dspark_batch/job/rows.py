"""Configs of callers that bring their rows: input and output may be missing, and what is for files alone is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.job.loader import config_from_values, read_values, source_of

_INSTEAD = {
    "filter": "filter the rows before",
    "limit": "give so many rows",
    "incremental": "give the new rows only",
    "version": "read that version yourself",
}


def sections_of(config: ConfigLike, *, path: str) -> tuple[dict[str, Any], str]:
    """The sections of a config, with ``path`` for both paths where they are missing; and its name in problems."""
    values = read_values(config)
    for section in ("input", "output"):
        given = values.get(section)
        if given is None or isinstance(given, Mapping):
            values[section] = {"path": path, **(given or {})}
    return values, source_of(config)


def job_of_sections(values: Mapping[str, Any], *, source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The validated job. Raises ConfigError, also for what a caller with rows of its own would see ignored."""
    job = config_from_values(values, source=source, overrides=overrides)
    problems = [
        Problem(f"input.{name}", f"is for files and tables on disk, and here the caller brings the rows; {instead}")
        for name, instead in _INSTEAD.items()
        if getattr(job.input, name) is not None
    ]
    if problems:
        raise ConfigError(problems)
    return job
