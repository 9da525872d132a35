"""SIGKILL at random moments, of the driver and of actor processes: every row exactly once, values as if undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.testing.engine_factories import STEP_DELAY_VARIABLE
from dspark_batch.testing.jobs import SCRIPTED, Job, reviews, write_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SEED = 20261123
NUM_ROWS = 240
ROWS_PER_SHARD = 5
KILLS = ["driver"] * 4 + ["actor"] * 6
STEP_DELAY_S = 0.15
PATIENCE_S = 90.0


@dataclass
class Cluster:
    """Drivers of one job and every process that came from them, recognised by a variable in their environment."""

    job: Job
    tmp: str
    driver: subprocess.Popen[bytes] | None = None
    logs: list[Path] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            ENGINE_FACTORY_VARIABLE: SCRIPTED,
            STEP_DELAY_VARIABLE: str(STEP_DELAY_S),
            "RAY_TMPDIR": self.tmp,
            "RAY_ADDRESS": "",
        }

    def start(self) -> subprocess.Popen[bytes]:
        log = self.job.folder / f"driver{len(self.logs)}.log"
        self.logs.append(log)
        command = [sys.executable, str(ROOT / "jobs" / "generate.py"), self.job.write(), "engine.backend=ray"]
        with log.open("wb") as output:
            self.driver = subprocess.Popen(
                command, stdout=output, stderr=output, env=self.environment(), start_new_session=True
            )
        return self.driver

    def running_driver(self) -> subprocess.Popen[bytes]:
        if self.driver is None or self.driver.poll() is not None:
            return self.start()
        return self.driver

    def processes(self, *, title: str = "") -> list[int]:
        marker = f"RAY_TMPDIR={self.tmp}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                is_ours = marker in (entry / "environ").read_bytes().split(b"\0")
                if is_ours and title in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
        return found

    def num_commits(self) -> int:
        return len(list((self.job.out / "_dspark" / "manifest").glob("*.json")))

    def last_log(self) -> str:
        return self.logs[-1].read_text(errors="replace")[-3000:] if self.logs else ""

    def end(self) -> None:
        """Kill what is left, by id, until nothing is."""
        deadline_s = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline_s:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        if self.driver is not None:
            self.driver.wait(timeout=10)
        assert not self.processes()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    job = write_job(tmp_path, reviews(NUM_ROWS), rows_per_shard=ROWS_PER_SHARD)
    with tempfile.TemporaryDirectory(prefix="dsk", ignore_cleanup_errors=True) as tmp:
        cluster = Cluster(job, tmp)
        try:
            yield cluster
        finally:
            cluster.end()


def wait_for(condition: Callable[[], bool], *, what: str, cluster: Cluster) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}; log:\n{cluster.last_log()}"
        time.sleep(0.02)


def random_moment(cluster: Cluster, rng: random.Random) -> None:
    """After some seconds of the process, or a moment after some more commits."""
    driver = cluster.running_driver()
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0.0, 5.0))
        return
    goal = cluster.num_commits() + rng.randint(1, 3)
    wait_for(
        lambda: cluster.num_commits() >= goal or driver.poll() is not None, what=f"{goal} commits", cluster=cluster
    )
    time.sleep(rng.uniform(0.0, 0.4))


def kill_an_actor(cluster: Cluster, rng: random.Random) -> None:
    actors: list[int] = []

    def is_there() -> bool:
        actors[:] = cluster.processes(title="ray::MapWorker")
        return bool(actors)

    wait_for(is_there, what="an actor", cluster=cluster)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(actors), signal.SIGKILL)


def test_a_run_killed_at_random_moments_ends_with_every_row_once_and_the_undisturbed_values(cluster: Cluster) -> None:
    rng = random.Random(SEED)
    kills = KILLS.copy()
    rng.shuffle(kills)
    plain = cluster.job.folder / "plain"
    assert run_cli(["run", cluster.job.write(), f"output.path={plain}"]) == 0

    for kind in kills:
        random_moment(cluster, rng)
        driver = cluster.running_driver()
        assert driver.poll() is None, f"the run ended before its kill:\n{cluster.last_log()}"
        if kind == "driver":
            driver.kill()
            driver.wait(timeout=10)
        else:
            kill_an_actor(cluster, rng)
    num_before = cluster.num_commits()
    assert 0 < num_before < NUM_ROWS // ROWS_PER_SHARD

    assert cluster.running_driver().wait(timeout=PATIENCE_S * 2) == 0, cluster.last_log()
    out = cluster.job.out
    assert {file.name: file.read_bytes() for file in out.glob("*.parquet")} == {
        file.name: file.read_bytes() for file in plain.glob("*.parquet")
    }
    assert read_output(str(out)).column("id").to_pylist() == [f"r{n}" for n in range(NUM_ROWS)]
    assert (out / "_SUCCESS").exists()
    assert run_cli(["run", cluster.job.write()]) == 0


def test_sigterm_lets_running_shards_commit_and_the_same_command_goes_on(cluster: Cluster) -> None:
    driver = cluster.start()
    wait_for(lambda: cluster.num_commits() >= 2 or driver.poll() is not None, what="2 commits", cluster=cluster)
    driver.terminate()
    assert driver.wait(timeout=PATIENCE_S) == 1, cluster.last_log()
    assert "the same command goes on from here" in cluster.last_log()
    num_committed = cluster.num_commits()
    assert 2 <= num_committed < NUM_ROWS // ROWS_PER_SHARD
    assert not list((cluster.job.out / "_dspark" / "staging").glob("*"))
    wait_for(lambda: not cluster.processes(), what="the end of Ray", cluster=cluster)
    assert run_cli(["run", cluster.job.write()]) == 0
    assert read_output(str(cluster.job.out)).column("id").to_pylist() == [f"r{n}" for n in range(NUM_ROWS)]
