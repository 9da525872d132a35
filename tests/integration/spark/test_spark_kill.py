"""SIGKILL of a driver, its JVM and its workers in the middle of each stage of ``run_table``; then the same call."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.spark import generate, run_table
from dspark_batch.spark.staging import Stages, StagingFolder
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.processes import kill_processes_with
from dspark_batch.testing.spark_rows import job_values
from dspark_batch.testing.wide_table import PROMPT, TARGET, WIDE_SCHEMA, Stage, TableDriver, canonical, wide_rows

pytestmark = [
    pytest.mark.spark,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

SEED = 20261123
NUM_ROWS = 60
ROWS_PER_SHARD = 5
STEP_DELAY_S = 0.2
PATIENCE_S = 120.0
MARK = "DSPARK_BATCH_TEST_DRIVER"
SLOW_RAY = (pytest.mark.slow, pytest.mark.ray)


class Drivers:
    """Starts drivers, and kills them with everything that came from them."""

    def __init__(self, folder: Path, ray_folder: str) -> None:
        self.folder = folder
        self._log = folder / "driver.log"
        self._environment = {**os.environ, MARK: str(folder), "RAY_TMPDIR": ray_folder, "RAY_ADDRESS": ""}

    def start(self, driver: TableDriver) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dspark_batch.testing.wide_table", driver.to_json()]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, cwd=self.folder)

    def wait(self, process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not until():
            assert process.poll() is None, f"the driver ended by itself:\n{self.log_tail()}"
            assert time.monotonic() < deadline_s, f"waited in vain; the log ends:\n{self.log_tail()}"
            time.sleep(0.02)

    def kill(self) -> None:
        kill_processes_with(MARK, str(self.folder))

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Drivers]:
    with tempfile.TemporaryDirectory(prefix="dsk", ignore_cleanup_errors=True) as ray_folder:
        found = Drivers(tmp_path, ray_folder)
        try:
            yield found
        finally:
            found.kill()


def stages_of(driver: TableDriver) -> Stages | None:
    return StagingFolder(str(driver.staging)).load()


def num_commits(driver: TableDriver) -> int:
    return len(list((driver.staging / "output" / "_dspark" / "manifest").glob("*.json")))


def kill_in(stage: Stage, driver: TableDriver, *, drivers: Drivers) -> None:
    """Run the driver into the stage, and kill it at a random moment there."""
    rng = random.Random(f"{SEED} {stage} {driver.backend}")
    process = drivers.start(driver)
    if stage == "staging":
        drivers.wait(process, (driver.staging / "input" / "_temporary").exists)
        time.sleep(rng.uniform(0.0, 2.0))
    elif stage == "generation":
        goal = rng.randint(1, 4)
        drivers.wait(process, lambda: num_commits(driver) >= goal)
        time.sleep(rng.uniform(0.0, 0.3))
    else:
        drivers.wait(process, lambda: (found := stages_of(driver)) is not None and found.is_landing)
        time.sleep(rng.uniform(0.0, 4.0))
    drivers.kill()
    assert process.wait(timeout=10) < 0, f"the driver ended before its kill:\n{drivers.log_tail()}"
    stages = stages_of(driver)
    reached = stages is not None and (stages.is_staged, stages.is_landing, stages.is_landed)
    assert reached == {"staging": False, "generation": (True, False, False), "landing": (True, True, False)}[stage]


def committed_ids(driver: TableDriver) -> set[int]:
    output = str(driver.staging / "output")
    if not (driver.staging / "output").exists() or not RunStore(output).committed(verify_checksums=False):
        return set()
    ids: list[int] = read_output(output).column("id").to_pylist()
    return set(ids)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("staging", marks=pytest.mark.slow),
        pytest.param("generation", marks=pytest.mark.slow),
        "landing",
    ],
)
@pytest.mark.parametrize("backend", ["spark", pytest.param("ray", marks=SLOW_RAY)])
def test_a_driver_killed_in_a_stage_leaves_all_that_the_next_one_needs(
    spark, engine, drivers, stage, backend, request
) -> None:
    config = {**job_values(engine.path), "shards": {"rows": ROWS_PER_SHARD}, "limits": {"max_failed_fraction": 1.0}}
    frame = spark.createDataFrame(wide_rows(NUM_ROWS), WIDE_SCHEMA)
    undisturbed = canonical(generate(frame, config, prompt=PROMPT, id="id"))
    driver = TableDriver(
        folder=str(drivers.folder), config=config, num_rows=NUM_ROWS, backend=backend, keeps_tables=stage == "landing"
    )
    EngineFolder.make(engine.path, step_delay_s=STEP_DELAY_S if stage == "generation" else 0.0)
    kill_in(stage, replace(driver, slow=stage), drivers=drivers)
    done = committed_ids(driver)
    assert {"staging": done == set(), "generation": 0 < len(done) < NUM_ROWS, "landing": len(done) == NUM_ROWS + 2}[
        stage
    ]

    EngineFolder.make(engine.path)
    engine.forget()
    if driver.keeps_tables:
        again = drivers.start(driver)
        assert again.wait(timeout=PATIENCE_S) == 0, drivers.log_tail()
        landed = json.loads(driver.result.read_text())
    else:
        request.addfinalizer(lambda: spark.sql(f"DROP TABLE IF EXISTS {TARGET}"))
        landed = canonical(
            run_table(
                spark, frame, TARGET, config, staging=str(driver.staging), backend=backend, prompt=PROMPT, id="id"
            )
        )
    assert landed == undisturbed
    missing = [f"Say {row[1]}" for row in wide_rows(NUM_ROWS) if row[0] not in done and row[1] is not None]
    assert sorted(engine.rows()) == sorted(missing)
