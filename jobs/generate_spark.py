"""Entry point for ``spark-submit jobs/generate_spark.py CONFIG --source TABLE --target TABLE --staging FOLDER``."""

import sys

from dspark_batch.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(["table", *sys.argv[1:]]))
