"""``python -m dspark_batch.training.run CONFIG [KEY=VALUE]... [--max-minutes M] [--until STAGE]``: the training command
without the command line's libraries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dspark_batch.errors import ConfigError, DSparkBatchError
from dspark_batch.training.deadline import Deadline

UNFINISHED, BAD_CONFIG = 1, 2


def train(config: str, *, overrides: Sequence[str], max_minutes: float | None, until: str) -> int:
    """Run or resume a training; 0 once it is done, 1 where the time was up first. Raises DSparkBatchError."""
    deadline = Deadline.in_minutes(max_minutes)
    from dspark_batch.training.load import load_train_config
    from dspark_batch.training.pipeline import run_training

    is_done = run_training(load_train_config(config, overrides=overrides), deadline=deadline, last_stage=until)
    return 0 if is_done else UNFINISHED


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line; errors of users go to stderr."""
    parser = argparse.ArgumentParser(prog="python -m dspark_batch.training.run", description=train.__doc__)
    parser.add_argument("config", help="YAML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--max-minutes", type=float, default=None)
    parser.add_argument("--until", default="evaluate", help="last stage: prompts, responses, train or evaluate")
    given = parser.parse_args(arguments)
    try:
        return train(given.config, overrides=given.overrides, max_minutes=given.max_minutes, until=given.until)
    except DSparkBatchError as error:
        sys.stderr.write(f"dspark-batch train: {error}\n")
        return BAD_CONFIG if isinstance(error, ConfigError) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
