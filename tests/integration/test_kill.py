"""The kill matrix in short: every kind of process, both signals, every sink; and what a user sees of a stop.

The whole of it is ``python -m dspark_batch.bench.kill_matrix``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_batch.testing.engine_factories import STEP_DELAY_VARIABLE
from dspark_batch.testing.kill_job import NUM_SHARDS, STEP_DELAY_S, KillJob, Rows, make_kill_job, undisturbed_rows
from dspark_batch.testing.kill_runs import KillPlan, kill_run, plan_run
from dspark_batch.testing.ray_nodes import TwoNodes, two_nodes

pytest.importorskip("deltalake")
pytest.importorskip("pyiceberg")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

CELLS = [
    ("driver", "SIGKILL", "delta"),
    ("driver", "SIGTERM", "parquet"),
    ("actor", "SIGKILL", "parquet"),
    ("actor", "SIGTERM", "iceberg"),
    ("raylet", "SIGKILL", "iceberg"),
    ("raylet", "SIGTERM", "delta"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes({STEP_DELAY_VARIABLE: str(STEP_DELAY_S)}) as running:
        running.driver()  # starts while the undisturbed rows are made
        yield running


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return undisturbed_rows(tmp_path_factory.mktemp("undisturbed"), engine="scripted")


def plan_of(cell: tuple[str, str, str], *, seed: int) -> KillPlan:
    """The first drawn plan of a cell that strikes while shards are being committed."""
    plans = (plan_run(run, seed=seed) for run in range(1000))
    return next(
        plan
        for plan in plans
        if (plan.target, plan.signal, plan.sink) == cell and 1 <= (plan.num_commits or 0) <= NUM_SHARDS - 4
    )


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_job_whose_process_is_killed_ends_with_every_row_once_and_the_undisturbed_values(
    nodes: TwoNodes, expected: Rows, tmp_path: Path, cell: tuple[str, str, str]
) -> None:
    record = kill_run(plan_of(cell, seed=20261123), nodes=nodes, folder=tmp_path / "job", expected=expected)
    assert record.problem is None, record.problem
    assert record.phase == "working"
    assert 1 <= record.num_commits_at_kill < NUM_SHARDS
    assert record.is_clean, record.audit
    assert record.audit is not None
    assert record.audit.num_rows == len(expected)
    assert record.num_restarts == (1 if cell[0] == "driver" else 0), record.exit_codes


def wait_for(condition: Callable[[], bool], job: KillJob) -> None:
    deadline_s = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline_s, job.last_log()
        time.sleep(0.02)


def test_a_stopped_run_says_so_and_leaves_nothing_staged(nodes: TwoNodes, tmp_path: Path) -> None:
    job = make_kill_job(tmp_path, sink="parquet", engine="scripted", address=nodes.address)
    command = job.start(nodes.driver())
    wait_for(lambda: job.num_commits >= 2 or command.poll() is not None, job)
    command.send_signal(signal.SIGTERM)
    wait_for(lambda: command.poll() is not None, job)
    assert command.poll() == 1
    assert "the same command goes on from here" in job.last_log()
    assert 2 <= job.num_commits < NUM_SHARDS
    assert not list((job.out / "_dspark" / "staging").glob("*"))


def test_a_model_that_does_not_load_on_a_cluster_is_named_without_a_trace_of_ray(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    job = make_kill_job(tmp_path, sink="parquet", engine="missing", address=nodes.address)
    command = job.start(nodes.driver())
    wait_for(lambda: command.poll() is not None, job)
    assert command.poll() == 1
    assert job.last_words()[-1].endswith("no such checkpoint (scripted)")
    assert "Traceback" not in job.last_log()
    assert "RayTaskError" not in job.last_log()
