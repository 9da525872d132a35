"""A Ray with room for several actors, and jobs whose engine notes what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.ray_data.environment import prepare_local_environment
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.jobs import Job, reviews, write_job

NUM_CPUS = 4


@pytest.fixture(scope="module")
def ray_of_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray on the loopback with four CPUs, as many as the machine may not have; runs find it and leave it running."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_metrics_report_interval_ms", "1000")
        environment.setenv(ENGINE_FACTORY_VARIABLE, FACTORY)
        environment.delenv("RAY_ADDRESS", raising=False)
        prepare_local_environment()
        import ray

        ray.init(
            address="local",
            num_cpus=NUM_CPUS,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=96 * 1024 * 1024,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            yield
        finally:
            ray.shutdown()


MakeRayJob = Callable[..., tuple[Job, EngineFolder]]


@pytest.fixture
def make_ray_job(ray_of_four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRayJob:
    """A job on that Ray with a counting engine, by number of rows and options of the engine."""
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, FACTORY)

    def make(num_rows: int, *, rows_per_shard: int, **options: Any) -> tuple[Job, EngineFolder]:
        folder = EngineFolder.make(tmp_path / "engine", **options)
        job = write_job(tmp_path, reviews(num_rows), rows_per_shard=rows_per_shard)
        job.config["engine"]["backend"] = "ray"
        job.config["model"] = {"target": str(folder.path)}
        job.config["ray"] |= {"num_cpus": 1}
        return job, folder

    return make
