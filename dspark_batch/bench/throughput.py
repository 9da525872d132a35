"""``dspark-batch bench throughput``: one config over a prompt file, plain and as configured, at several concurrencies.

A repeat runs both settings once at every concurrency, on the same prompts and with fresh engines, so that drift of the
machine hits all alike; ratios are medians of per-repeat ratios. Later repeats take further prompts of the file.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.bench.measure import Measurement, Setting, measure
from dspark_batch.bench.prompts import read_prompts, with_sampling
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_batch.job.config import JobConfig

PLAIN = "plain"
CONFIGURED = "configured"
_FEWEST_ROWS = 4
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. num_rows: rows per run; None: twice the concurrency, and at least 4."""

    config: Path
    prompts: Path
    column: str = "prompt"
    overrides: tuple[str, ...] = ()
    concurrencies: tuple[int, ...] = (1, 8, 32, 128)
    repeats: int = 5
    num_rows: int | None = None

    def rows_at(self, concurrency: int) -> int:
        return self.num_rows or max(_FEWEST_ROWS, 2 * concurrency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """All runs of one setting at one concurrency. ratio: to plain, median over repeats."""

    setting: str
    concurrency: int
    ratio: float
    runs: tuple[Measurement, ...]

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(run.tokens_per_s for run in self.runs)

    @property
    def accepted_length(self) -> float:
        """Emitted tokens per row and round over all runs; the one token that a prefill gives counts as a round."""
        accepted = self.total("num_accepted_tokens")
        return 1.0 + accepted / max(1, self.total("num_emitted_tokens") - accepted)

    def total(self, name: str) -> float:
        return float(sum(getattr(run, name) for run in self.runs))

    def share(self, part: str) -> float:
        """Of the wall time: draft, forward, sample, host, or tail."""
        return self.total(f"{part}_s") / self.total("wall_s")

    def as_dict(self) -> dict[str, Any]:
        head = {name: getattr(self, name) for name in ("setting", "concurrency", "tokens_per_s", "ratio")}
        shares = {f"{part}_share": self.share(part) for part in ("draft", "forward", "sample", "host", "tail")}
        return {**head, "accepted_length": self.accepted_length, **shares, "runs": [r.as_dict() for r in self.runs]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures, and all that is needed to repeat them."""

    plan: Plan
    engine: EngineConfig
    sampling: SamplingParams
    entries: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        plan = {**asdict(self.plan), "config": str(self.plan.config), "prompts": str(self.plan.prompts)}
        return {
            "entries": [entry.as_dict() for entry in self.entries],
            "plan": plan,
            "engine": self.engine.model_dump(mode="json"),
            "sampling": asdict(self.sampling),
            "versions": versions(),
            "device": asdict(device_facts()),
            "commit": commit_of_checkout(),
        }

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        shown = "concurrency setting tokens/s ratio length emitted drafted verified accepted wasted"
        parts = ("draft", "forward", "sample", "host", "tail")
        table = Table(
            *shown.split(), *parts, title=f"{self.engine.target}, {self.engine.dtype}, {self.plan.prompts.name}"
        )
        for entry in self.entries:
            counts = ("emitted_tokens", "drafted_tokens", "verified_draft_tokens", "accepted_tokens", "wasted_tokens")
            table.add_row(
                str(entry.concurrency),
                entry.setting,
                f"{entry.tokens_per_s:.1f}",
                f"{entry.ratio:.2f}",
                f"{entry.accepted_length:.2f}",
                *(f"{entry.total('num_' + name):.0f}" for name in counts),
                *(f"{entry.share(part):.1%}" for part in parts),
            )
        return table


def bench_config(path: Path, *, overrides: Sequence[str] = ()) -> JobConfig:
    """A job config of which only model, speculation, engine and sampling matter; input, prompt, output may be missing.

    Raises:
        ConfigError: as ``job.loader.load_config``.
    """
    from dspark_batch.job.loader import config_from_values, read_values

    values = read_values(path)
    stand_ins = {"input": {"path": "none"}, "prompt": {"template": "none"}, "output": {"path": "none"}}
    for section, value in stand_ins.items():
        values[section] = values.get(section) or value
    return config_from_values(values, source=str(path), overrides=overrides)


def run_throughput(plan: Plan, *, tell: Callable[[str], None] | None = None) -> Report:
    """Load the target once, warm up, and measure. ``tell`` is given a line after every run.

    Raises:
        ConfigError, ModelError, InputError: config, checkpoint or prompt file cannot be used.
        ValueError: a prompt failed.
    """
    import torch

    from dspark_batch.models.loader import load_target

    config = bench_config(plan.config, overrides=plan.overrides)
    engine, sampling = config.engine_config(), config.sampling_params()
    requests = read_prompts(plan.prompts, column=plan.column)
    if isinstance(engine.threads, int):
        torch.set_num_threads(engine.threads)
    loaded = load_target(engine)
    settings = {PLAIN: engine.model_copy(update={"drafter": "none", "schedule": "off"}), CONFIGURED: engine}
    if config.speculation.drafter == "none" or config.speculation.schedule == "off":
        del settings[CONFIGURED]
    warm_up = SamplingParams(max_new_tokens=_WARM_UP_TOKENS)
    for setting in settings.values():
        measure(loaded, Setting(config=setting), with_sampling(requests, warm_up, first=0, count=_FEWEST_ROWS))
    runs: dict[tuple[str, int], list[Measurement]] = {}
    for repeat in range(plan.repeats):
        for concurrency in plan.concurrencies:
            chosen = _rows_of(plan, requests, sampling, repeat=repeat, concurrency=concurrency)
            order = list(settings) if repeat % 2 == 0 else list(settings)[::-1]
            for name in order:
                at = settings[name].model_copy(update={"max_concurrency": concurrency})
                run = measure(loaded, Setting(config=at), chosen)
                runs.setdefault((name, concurrency), []).append(run)
                if tell is not None:
                    tell(f"repeat {repeat + 1}, concurrency {concurrency}, {name}: {run.tokens_per_s:.1f} tokens/s")
    entries = [_entry(runs, name, concurrency) for concurrency in plan.concurrencies for name in settings]
    return Report(plan=plan, engine=engine, sampling=sampling, entries=tuple(entries))


def commit_of_checkout() -> str | None:
    """The commit of the source tree that this module lies in, "+" after it where files differ; None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _rows_of(
    plan: Plan, requests: list[Request], sampling: SamplingParams, *, repeat: int, concurrency: int
) -> list[Request]:
    count = plan.rows_at(concurrency)
    return with_sampling(requests, sampling, first=repeat * count, count=count)


def _entry(runs: dict[tuple[str, int], list[Measurement]], setting: str, concurrency: int) -> Entry:
    own, plain = runs[setting, concurrency], runs[PLAIN, concurrency]
    ratio = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(own, plain, strict=True))
    return Entry(setting=setting, concurrency=concurrency, ratio=ratio, runs=tuple(own))
