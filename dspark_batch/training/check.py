"""How a training does so far: accepted lengths by real decoding with the weights that it saved last.

``python -m dspark_batch.training.check CONFIG [KEY=VALUE]... [--prompts 8] [--temperatures 0]`` reads a training's
state, also while that runs, and writes nothing but ``output/checked``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark_batch.errors import DSparkBatchError
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.evaluate import Acceptance
from dspark_batch.training.finish import evaluate
from dspark_batch.training.load import load_train_config
from dspark_batch.training.pipeline import Folders, open_trainer, training_rows, write_drafter


def check_training(
    config: TrainConfig, *, num_prompts: int, temperatures: Sequence[float]
) -> tuple[int, tuple[Acceptance, ...]]:
    """(steps done, accepted lengths on the config's sets and on held-out prompts).

    Raises:
        InputError: there is nothing to train on yet.
        ConfigError, ModelError, OutputError, EngineError: as training says.
    """
    folders = Folders(Path(config.output).expanduser())
    rows, held_out = training_rows(config, folders)
    trainer, _ = open_trainer(config, folders, rows)
    step = trainer.progress.step
    folder = folders.root / "checked"
    write_drafter(trainer, folder)
    del trainer
    section = config.evaluate.model_copy(update={"num_prompts": num_prompts, "temperatures": list(temperatures)})
    chosen = config.model_copy(update={"evaluate": section})
    _, results = evaluate(chosen, folder, held_out, say=lambda text: None)
    return step, results


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line."""
    parser = argparse.ArgumentParser(prog="python -m dspark_batch.training.check", description=__doc__)
    parser.add_argument("config", help="YAML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--prompts", type=int, default=8, help="per set")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    given = parser.parse_args(arguments)
    try:
        config = load_train_config(given.config, overrides=given.overrides)
        step, results = check_training(config, num_prompts=given.prompts, temperatures=given.temperatures)
    except DSparkBatchError as error:
        sys.stderr.write(f"check: {error}\n")
        return 1
    for result in results:
        shares = " ".join(f"{share:.3f}" for share in result.by_position)
        sys.stdout.write(
            f"step {step}  {result.name} ({result.num_prompts} prompts)  T={result.temperature:g}  accepted length "
            f"{result.accepted_length:.3f}  by position {shares}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
