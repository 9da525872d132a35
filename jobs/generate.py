"""Entry point for ``ray job submit --working-dir . -- python jobs/generate.py configs/x.yaml [key=value ...]``."""

import sys

from dspark_batch.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(["run", *sys.argv[1:]]))
