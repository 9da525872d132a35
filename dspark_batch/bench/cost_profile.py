"""``dspark-batch profile``: measures, or reads, the cost table of a target and drafter; prints it and plots it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from dspark_batch.scheduling.cost_cache import CostKey
    from dspark_batch.scheduling.cost_table import CostTable


@dataclass(frozen=True, slots=True)
class Profile:
    """A table and what it is valid for."""

    key: CostKey
    table: CostTable

    def as_dict(self) -> dict[str, Any]:
        return {"key": self.key.as_dict(), "table": self.table.as_dict()}


def profile_command(
    config: Path | None,
    *,
    target: str | None,
    drafter: str | None,
    overrides: Sequence[str],
    plot: Path | None,
    is_fresh: bool,
    as_json: bool,
) -> None:
    """Run and print. config: YAML of a job; ``target`` and ``drafter`` replace what it says, or stand for it.

    Raises:
        ConfigError: neither config nor target is given, or a setting is wrong.
        ModelError: the checkpoint cannot be used, or has no room for a single row.
    """
    if plot is not None:
        _check_plotting()
    engine = _engine_config(config, target=target, drafter=drafter, overrides=overrides)
    profile = measure_profile(engine, is_fresh=is_fresh)
    _print(profile)
    if plot is not None:
        plot_table(profile.table, plot, title=f"{engine.target}, {profile.key.dtype}, {profile.key.device}")
        sys.stderr.write(f"wrote {plot}\n")
    if as_json:
        sys.stdout.write(json.dumps(profile.as_dict()) + "\n")


def measure_profile(engine: EngineConfig, *, is_fresh: bool = False) -> Profile:
    """The table that ``schedule: auto`` would use with these settings. is_fresh: measure even if there is one.

    Raises:
        ConfigError, ModelError: as the loader and the drafter say; ModelError also where nothing could be measured.
    """
    import torch

    from dspark_batch.engine.drafter_factory import make_drafter
    from dspark_batch.engine.step_profile import cost_key, cost_table
    from dspark_batch.errors import ModelError
    from dspark_batch.models.loader import load_target

    if isinstance(engine.threads, int):
        torch.set_num_threads(engine.threads)
    loaded = load_target(engine)
    made = make_drafter(engine, loaded.target, target_fingerprint=loaded.fingerprint)
    table = cost_table(loaded.target, made, engine, target_fingerprint=loaded.fingerprint, measure_anew=is_fresh)
    if table is None:
        raise ModelError(f"no step of {engine.target!r} could be measured; raise engine.kv_cache_gib")
    return Profile(cost_key(loaded.target, made, engine, target_fingerprint=loaded.fingerprint), table)


def step_tables(table: CostTable) -> list[Table]:
    """One for each context: milliseconds by rows and tokens per row."""
    from rich.table import Table

    tables = []
    for context in sorted({step.context_tokens for step in table.steps}):
        steps = [step for step in table.steps if step.context_tokens == context]
        shown = Table("rows", "tokens", "ms", "µs a token", "to plain", title=f"step, context {context}")
        for step in steps:
            plain = next(s for s in steps if s.num_rows == step.num_rows)
            shown.add_row(
                str(step.num_rows),
                str(step.num_tokens),
                f"{1e3 * step.seconds:.2f}",
                f"{1e6 * step.seconds / step.num_tokens:.0f}",
                f"{step.seconds / plain.seconds:.2f}",
                end_section=step is steps[-1] or steps[steps.index(step) + 1].num_rows != step.num_rows,
            )
        tables.append(shown)
    return tables


def draft_table(table: CostTable) -> Table:
    """Milliseconds by rows and tokens."""
    from rich.table import Table

    shown = Table("rows", "tokens for each", "ms", title="draft")
    for draft in table.drafts:
        shown.add_row(str(draft.num_rows), str(draft.num_tokens), f"{1e3 * draft.seconds:.2f}")
    return shown


def plot_table(table: CostTable, file: Path, *, title: str) -> None:
    """Step times over flat tokens, a line for each number of rows, and draft times; the format by the file's ending.

    Raises:
        ConfigError: matplotlib is not installed, or does not know the ending.
    """
    _check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for context in sorted({step.context_tokens for step in table.steps}):
        of_context = [step for step in table.steps if step.context_tokens == context]
        for num_rows in sorted({step.num_rows for step in of_context}):
            points = [step for step in of_context if step.num_rows == num_rows]
            axes.plot(
                [p.num_tokens for p in points],
                [1e3 * p.seconds for p in points],
                marker=".",
                label=f"{num_rows} rows, context {context}",
            )
    for num_tokens in sorted({draft.num_tokens for draft in table.drafts}):
        drafts = [draft for draft in table.drafts if draft.num_tokens == num_tokens]
        rows, times = [d.num_rows for d in drafts], [1e3 * d.seconds for d in drafts]
        axes.plot(rows, times, marker="x", linestyle=":", label=f"draft of {num_tokens}, by rows")
    axes.set(xlabel="flat tokens", ylabel="ms", title=title, xscale="log", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="x-small")
    try:
        figure.savefig(file)
    except ValueError as error:
        raise ConfigError([Problem("--plot", f"{file}: {error}", "command line")]) from error


def _engine_config(
    config: Path | None, *, target: str | None, drafter: str | None, overrides: Sequence[str]
) -> EngineConfig:
    from pydantic import ValidationError

    from dspark_batch.bench.throughput import bench_config

    if config is None and target is None:
        raise ConfigError([Problem("CONFIG", "is missing; give a job file, or --target", "command line")])
    if config is None and overrides:
        raise ConfigError([Problem(overrides[0], "overrides a config, and none is given", "command line")])
    engine = EngineConfig() if config is None else bench_config(config, overrides=overrides).engine_config()
    given = {name: value for name, value in (("target", target), ("drafter", drafter)) if value is not None}
    try:
        return EngineConfig(**{**engine.model_dump(), **given, "schedule": "auto"})
    except ValidationError as error:
        raise ConfigError([Problem("--drafter", str(error.errors()[0]["msg"]), "command line")]) from None


def _check_plotting() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        hint = "needs matplotlib; run: pip install 'dspark-batch[report]'"
        raise ConfigError([Problem("--plot", hint, "command line")])


def _print(profile: Profile) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, value in profile.key.as_dict().items():
        console.print(f"{name}: {value}", highlight=False)
    for table in step_tables(profile.table):
        console.print(table)
    if profile.table.drafts:
        console.print(draft_table(profile.table))
