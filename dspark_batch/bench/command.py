"""What ``dspark-batch bench throughput`` prints: progress on stderr, a table, on request one JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark_batch.bench.throughput import Plan, run_throughput
from dspark_batch.errors import ConfigError, Problem


def throughput(
    config: Path,
    *,
    prompts: Path,
    overrides: Sequence[str],
    column: str,
    concurrency: str,
    repeats: int,
    num_rows: int | None,
    as_json: bool,
) -> None:
    """Run and print.

    Raises:
        ConfigError: also where ``concurrency`` is no list of positive whole numbers.
    """
    from rich.console import Console

    plan = Plan(
        config=config,
        prompts=prompts,
        column=column,
        overrides=tuple(overrides),
        concurrencies=parse_concurrencies(concurrency),
        repeats=repeats,
        num_rows=num_rows,
    )
    report = run_throughput(plan, tell=_tell)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.table())
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict()) + "\n")


def parse_concurrencies(text: str, *, option: str = "--concurrency") -> tuple[int, ...]:
    """``"1,8,32"`` -> (1, 8, 32). Raises ConfigError, naming ``option``, for anything but positive whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError([Problem(option, f"must be whole numbers such as 1,8,32, got {text!r}", "command line")])
    return tuple(int(part) for part in parts)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
