"""Kinds of sessions that cannot share a process with the classic ``local`` one, each in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.processes import wait_until_gone

pytestmark = pytest.mark.spark

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def run_suite(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-q", "-x", "-p", "no:cacheprovider", "-m", ""]
    environment = {
        **os.environ,
        "DSPARK_BATCH_ENGINE_FACTORY": FACTORY,
        "DSPARK_BATCH_TEST_FOLDER": str(folder),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_connect_gives_the_local_backends_texts_in_every_way_in(tmp_path: Path) -> None:
    run_suite("connect_suite.py", tmp_path)
    wait_until_gone(load["pid"] for load in EngineFolder(tmp_path / "engine").loads())


def test_executors_with_gpus_use_their_own(tmp_path: Path) -> None:
    run_suite("gpu_suite.py", tmp_path)
