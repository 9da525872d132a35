"""What the benchmarks' commands share: options with one name and meaning everywhere, and how a command is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, DSparkBatchError, Problem

Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of a run.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Interleaved repeats; medians are shown.")]
Concurrency = Annotated[str, typer.Option("--concurrency", help="Rows decoded together, comma-separated.")]
ContextTokens = Annotated[int, typer.Option("--context", min=1, help="Tokens that each row has already.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens generated per row.")]
MaxDraftTokens = Annotated[
    int | None, typer.Option("--max-draft-tokens", min=1, help="Most tokens drafted per round; default: the drafter's.")
]
Target = Annotated[str, typer.Option("--target", help="Embedded name, local folder or hub id.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Drafters = Annotated[str, typer.Option("--drafters", help="Drafters to compare, comma-separated.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: every core.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as one JSON object, last line.")]

DEFAULT_TARGET: str = EngineConfig.model_fields["target"].default

BAD_CONFIG = 2
FATAL = 1


def run_module(command: Callable[..., None], arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark's command, with the options of ``sys.argv`` by default; gives its exit code.

    Errors of users go to the standard error, without a traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(args=None if arguments is None else list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except DSparkBatchError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_CONFIG if isinstance(error, ConfigError) else FATAL
    return 0


def engine_config(values: Mapping[str, object]) -> EngineConfig:
    """The engine's settings out of options. Raises ConfigError."""
    try:
        return EngineConfig.model_validate(dict(values))
    except ValueError as error:
        raise ConfigError([Problem("engine", str(error), "command line")]) from None


def names(text: str) -> tuple[str, ...]:
    """``"none, suffix"`` -> ("none", "suffix")"""
    return tuple(part.strip() for part in text.split(","))


def write_json(value: object) -> None:
    """One line on the standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
