"""``dspark-batch bench calibration``: how well acceptance can be foretold, by real decoding with full verification.

Every draft is verified in full, so the outcome of each position is known up to the first rejection and nothing is left
out by choice. The recorded rounds then go once through every estimator that the drafter's signals allow; each predicts
a round before it sees the outcome, and the first part of the run only warms them up. So all counted predictions are of
rounds that the estimator had not seen; give a file of prompts that the drafter was not trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Dtype,
    MaxNewTokens,
    Target,
    Threads,
    engine_config,
    run_module,
    write_json,
)
from dspark_batch.bench.prompts import read_prompts, with_sampling
from dspark_batch.bench.scheduler import BUILT_IN_PROMPTS, built_in_prompts
from dspark_batch.bench.throughput import commit_of_checkout
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_batch.engine.engine import ServedTarget
    from dspark_batch.scheduling.replay import EstimatorQuality
    from dspark_batch.scheduling.traces import RecordedRound


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBench:
    """What was decoded, and the quality of every estimator over it."""

    drafter: str
    num_positions: int
    num_prompts: int
    num_row_rounds: int
    accepted_length: float
    estimators: tuple[EstimatorQuality, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """ECE and AUC of prefix survival, a position a row."""
        from rich.table import Table

        names = [estimator.name for estimator in self.estimators]
        title = f"{self.drafter}: ECE / AUC of prefix survival, accepted length {self.accepted_length:.2f}"
        table = Table("position", "rounds", "stands", "ECE by chance", *names, title=title)
        for qualities in zip(*(estimator.positions for estimator in self.estimators), strict=True):
            first = qualities[0]
            areas = ["-" if quality.auc is None else f"{quality.auc:.3f}" for quality in qualities]
            table.add_row(
                str(first.position + 1),
                str(first.num_rounds),
                f"{first.frequency:.3f}",
                f"{max(quality.ece_floor for quality in qualities):.3f}",
                *(f"{quality.ece:.3f} / {area}" for quality, area in zip(qualities, areas, strict=True)),
            )
        return table


def record_rounds(
    loaded: ServedTarget, config: EngineConfig, requests: Sequence[Request]
) -> tuple[list[RecordedRound], str, int]:
    """Decode with every draft verified in full; the rounds, the drafter's name and its longest draft.

    Raises:
        ConfigError, ModelError: the drafter cannot be made.
        ValueError: a request failed.
    """
    from dspark_batch.engine.drafter_factory import make_drafter
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.scheduling.policies import FixedLength
    from dspark_batch.scheduling.traces import TraceRecorder

    drafter = make_drafter(config, loaded.target, target_fingerprint=loaded.fingerprint)
    recorder = TraceRecorder(FixedLength(drafter.max_draft_tokens))
    with BatchEngine(loaded, config, drafter=drafter, policy=recorder) as engine:
        for result in engine.stream(requests):
            if result.error is not None:
                raise ValueError(f"request {result.id!r} failed: {result.error}")
    return recorder.rounds, drafter.name, drafter.max_draft_tokens


def judge(
    rounds: Sequence[RecordedRound], *, drafter: str, num_positions: int, num_prompts: int, warm_up: float
) -> CalibrationBench:
    """The estimators over recorded rounds."""
    from dspark_batch.scheduling.replay import replay_estimators

    num_row_rounds = sum(len(recorded.handles) for recorded in rounds)
    num_accepted = sum(sum(recorded.num_accepted) for recorded in rounds)
    return CalibrationBench(
        drafter=drafter,
        num_positions=num_positions,
        num_prompts=num_prompts,
        num_row_rounds=num_row_rounds,
        accepted_length=1.0 + num_accepted / max(1, num_row_rounds),
        estimators=replay_estimators(rounds, warm_up=warm_up),
    )


def command(
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `turns` or `prompt`; default: built in.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Prompts; default: each of the file once.")] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first prompt; the file goes round.")] = 0,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Annotated[float, typer.Option(min=0, help="Of the target and of the draft.")] = 0.0,
    target: Target = DEFAULT_TARGET,
    dtype: Dtype = "auto",
    drafter: Annotated[str, typer.Option(help="Whose acceptance is foretold.")] = "auto",
    drafter_path: Annotated[str | None, typer.Option(help="Checkpoint of a dspark or draft_model drafter.")] = None,
    verification: Annotated[str, typer.Option(help="coupled, token or block.")] = "coupled",
    concurrency: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 16,
    threads: Threads = None,
    warm_up: Annotated[float, typer.Option(min=0, max=1, help="Share of the rounds that do not count.")] = 0.3,
    trace: Annotated[Path | None, typer.Option(help="Write the rounds here, for bench simulate --trace.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the reliability plot here (.svg, .png).")] = None,
    as_json: AsJson = False,
) -> None:
    """How well every acceptance estimator foretells what is accepted: ECE, AUC and Brier score by draft position."""
    values = {"target": target, "dtype": dtype, "drafter": drafter, "drafter_path": drafter_path}
    more = {"verification": verification, "schedule": "fixed", "max_concurrency": concurrency}
    config = engine_config({**values, **more, "threads": threads or "auto"})
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    found_prompts = read_prompts(prompts) if prompts else built_in_prompts()
    requests = with_sampling(found_prompts, sampling, first=first, count=rows or len(found_prompts))
    rounds, name, num_positions = _record(config, requests)
    found = judge(rounds, drafter=name, num_positions=num_positions, num_prompts=len(requests), warm_up=warm_up)
    _show(found, rounds, trace=trace, plot=plot)
    if as_json:
        facts = {
            "engine": config.model_dump(mode="json"),
            "sampling": asdict(sampling),
            "prompts": str(prompts or BUILT_IN_PROMPTS),
            "warm_up": warm_up,
            "versions": versions(),
            "device": asdict(device_facts()),
            "commit": commit_of_checkout(),
        }
        write_json({**found.as_dict(), **facts})


def _record(config: EngineConfig, requests: Sequence[Request]) -> tuple[list[RecordedRound], str, int]:
    import torch

    from dspark_batch.models.loader import load_target

    if isinstance(config.threads, int):
        torch.set_num_threads(config.threads)
    return record_rounds(load_target(config), config, requests)


def _show(found: CalibrationBench, rounds: Sequence[RecordedRound], *, trace: Path | None, plot: Path | None) -> None:
    from rich.console import Console

    from dspark_batch.report.reliability import save_reliability_plot
    from dspark_batch.scheduling.traces import write_trace

    Console(width=None if sys.stdout.isatty() else 200).print(found.table())
    if trace is not None:
        write_trace(trace, rounds)
    if plot is not None:
        bins = {
            estimator.name: [
                [(b.chance, b.frequency, b.num_predictions) for b in quality.bins] for quality in estimator.positions
            ]
            for estimator in found.estimators
        }
        save_reliability_plot(bins, plot)


if __name__ == "__main__":
    sys.exit(run_module(command))
