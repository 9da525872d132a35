"""Does a drafter that was fine-tuned on one job's output do better on the next job of the same kind?

``python -m dspark_batch.bench.nightly FIRST NEXT --output DIR [--drafter FOLDER]`` takes the configs of two jobs. It
runs the first one unless it is done, goes on training the drafter (the embedded one by default) on what that job wrote,
and decodes prompts of the next job with the drafter before and after. Nothing of the next job is trained on. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.errors import ConfigError, DSparkBatchError, Problem

if TYPE_CHECKING:
    from dspark_batch.training.config import TrainConfig
    from dspark_batch.training.evaluate import Acceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class Nights:
    """first, next_job: configs of two jobs of one kind. drafter: what training goes on from; None: the embedded one."""

    first: Path
    next_job: Path
    output: Path
    drafter: Path | None
    num_steps: int
    anchors_per_step: int
    learning_rate: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accepted lengths on the next job's prompts at its temperature, full blocks, bonus included."""

    before: Acceptance
    after: Acceptance


def compare_nights(nights: Nights) -> Comparison:
    """Run, train, decode.

    Raises:
        ConfigError: a config is wrong, or there is no drafter to go on from.
        DSparkBatchError: as jobs and training say.
    """
    from dspark_batch.job.loader import absolute_paths, load_config
    from dspark_batch.job.runner import run_job
    from dspark_batch.training.config import TableSource
    from dspark_batch.training.evaluate import Evaluator
    from dspark_batch.training.pipeline import Folders, run_training
    from dspark_batch.training.prompts import table_prompts

    run_job(nights.first)
    job = absolute_paths(load_config(nights.next_job))
    source = TableSource(input=job.input, prompt=job.prompt)
    drafter = nights.drafter or _embedded(job.model.target)
    config = training_of(nights, drafter)
    run_training(config, last_stage="train")
    found = []
    for folder in (drafter, Folders(Path(config.output)).drafter):
        evaluator = Evaluator(config.engine_config(), folder, max_new_tokens=job.sampling.max_new_tokens)
        prompts = table_prompts(source, evaluator.codec, name="next")[: nights.num_prompts]
        found.append(evaluator.acceptance("next", prompts, temperature=job.sampling.temperature))
    return Comparison(*found)


def training_of(nights: Nights, drafter: Path) -> TrainConfig:
    """The training that goes on from ``drafter`` with the first job's prompts and responses."""
    from dspark_batch.job.loader import load_config
    from dspark_batch.training.config import TrainConfig

    job = load_config(nights.first)
    machine = ("device", "threads", "max_concurrency", "max_step_tokens", "kv_cache_gib")
    return TrainConfig.model_validate(
        {
            "model": job.model.model_dump(),
            "prompts": {"job": str(nights.first)},
            "start_from": str(drafter),
            "optimize": {
                "num_steps": nights.num_steps,
                "anchors_per_step": nights.anchors_per_step,
                "learning_rate": nights.learning_rate,
                "soft_ce_weight": 0.5,
                "distance_weight": 0.5,
                "ce_weight": 0.0,
            },
            "evaluate": {"num_heldout_prompts": 2},
            "run": {name: getattr(job.engine, name) for name in machine},
            "output": str(nights.output),
        }
    )


def _embedded(target: str) -> Path:
    from dspark_batch.drafters.dspark.embedded import embedded_drafter
    from dspark_batch.models.sources import resolve_source, weights_fingerprint

    found = embedded_drafter(weights_fingerprint(resolve_source(target, revision=None)))
    if found is None:
        raise ConfigError([Problem("--drafter", f"must name a folder: no drafter ships for {target}", "command line")])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line."""
    parser = argparse.ArgumentParser(prog="python -m dspark_batch.bench.nightly", description=__doc__)
    parser.add_argument("first", type=Path, help="config of the job whose output is trained on")
    parser.add_argument("next_job", metavar="next", type=Path, help="config of the job that is decoded")
    parser.add_argument("--output", type=Path, required=True, help="folder of the training")
    parser.add_argument("--drafter", type=Path, default=None, help="drafter to go on from; default: the embedded one")
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--anchors-per-step", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="both measurements as one JSON object, last line")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    try:
        found = compare_nights(Nights(**given))
    except DSparkBatchError as error:
        sys.stderr.write(f"nightly: {error}\n")
        return 1
    for name, result in (("before", found.before), ("after", found.after)):
        shares = " ".join(f"{share:.2f}" for share in result.by_position)
        sys.stdout.write(
            f"{name:<7} accepted length {result.accepted_length:.3f} at T={result.temperature:g} over "
            f"{result.num_prompts} prompts, by position {shares}\n"
        )
    if as_json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
