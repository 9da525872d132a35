"""Shared by the whole-pipeline tests: a job on a small table with an engine that needs no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.ray_data.environment import prepare_local_environment
from dspark_batch.testing.jobs import SCRIPTED, Job, reviews, write_job


@pytest.fixture(scope="module")
def ray_loopback() -> Iterator[None]:
    """One Ray for all tests of a module, as a run would start it; the runs find it and leave it running."""
    prepare_local_environment()
    from dspark_batch.job.config import RaySection
    from dspark_batch.ray_data.cluster import ray_session

    with ray_session(RaySection()):
        yield


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[pa.Table], Job]:
    """A job over a table, with the scripted engine in this process and in those it starts."""
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    return lambda table: write_job(tmp_path, table)


@pytest.fixture
def job(make_job: Callable[[pa.Table], Job]) -> Job:
    return make_job(reviews(47))
