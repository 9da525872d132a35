from __future__ import annotations

import os

import pytest

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.spark.client import EngineSpec
from dspark_batch.spark.config import SparkSection
from dspark_batch.spark.executor import (
    ProcessEngines,
    TaskFacts,
    prepare_process,
    sidecar_environment,
    sidecar_place,
    uses_sidecar,
    visible_devices,
)
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")


def facts(*gpus: str, num_cpus: int = 1, folder: str = "/tmp/executor") -> TaskFacts:
    return TaskFacts(gpus=gpus, num_cpus=num_cpus, executor_dir=folder)


def spec(target: str = "x", *, process: str = "auto", cores: int | None = None, **config: object) -> EngineSpec:
    return EngineSpec(
        config=EngineConfig(target=target, **config),
        settings=SparkSection(engine_process=process),
        factory=FACTORY,
        executor_cores=cores,
    )


@pytest.mark.parametrize(
    ("addresses", "inherited", "expected"),
    [
        (["0"], None, "0"),
        (["1", "2"], "", "1,2"),
        (["5"], "4,5", "5"),
        (["1"], "4,5", "5"),
        (["0", "1"], "GPU-aa,GPU-bb", "GPU-aa,GPU-bb"),
        (["7"], "4,5", "7"),
        (["GPU-cc"], "4,5", "GPU-cc"),
    ],
)
def test_gpu_addresses_become_visible_devices(addresses, inherited, expected) -> None:
    assert visible_devices(addresses, inherited=inherited) == expected


def test_an_engine_of_its_own_process_is_chosen_for_gpu_tasks_or_when_asked_for() -> None:
    assert not uses_sidecar(spec(), facts())
    assert uses_sidecar(spec(), facts("0"))
    assert uses_sidecar(spec(process="sidecar"), facts())
    assert not uses_sidecar(spec(process="worker"), facts("0"))


def test_sidecars_are_told_apart_by_executor_engine_and_gpus() -> None:
    places = {
        sidecar_place(spec(target), facts(*gpus, folder=folder))
        for target in ("a", "b")
        for gpus in ((), ("0",), ("1",))
        for folder in ("/tmp/e1", "/tmp/e2")
    }
    assert len(places) == 12
    assert sidecar_place(spec("a"), facts("1")) == sidecar_place(spec("a"), facts("1", num_cpus=4))


def test_a_sidecar_gets_the_executors_cores_and_the_tasks_gpus() -> None:
    usable = len(os.sched_getaffinity(0))
    assert sidecar_environment(spec(cores=1), facts("3")) == {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1"}
    assert sidecar_environment(spec(), facts())["OMP_NUM_THREADS"] == str(usable)
    assert sidecar_environment(spec(cores=10_000), facts())["OMP_NUM_THREADS"] == str(usable)
    assert sidecar_environment(spec(cores=1, threads=3), facts())["OMP_NUM_THREADS"] == "3"


def test_devices_and_threads_are_set_before_the_engine_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    prepare_process(EngineConfig(), facts("2", num_cpus=4))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "4"
    prepare_process(EngineConfig(threads=2), facts(num_cpus=8))
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_process_loads_an_engine_once_and_another_only_for_another_spec(tmp_path) -> None:
    first, second = (EngineFolder.make(tmp_path / name) for name in ("first", "second"))
    engines = ProcessEngines()
    for _ in range(3):
        engines.client(spec(str(first.path)), facts=facts(num_cpus=2)).close()
    assert [load["threads"] for load in first.loads()] == [2]
    engines.client(spec(str(second.path)), facts=facts())
    engines.client(spec(str(first.path)), facts=facts())
    assert (len(first.loads()), len(second.loads())) == (2, 1)
    engines.close()


def test_a_process_refuses_to_move_its_engine_to_another_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = EngineFolder.make(tmp_path)
    engines = ProcessEngines()
    one = spec(str(folder.path), process="worker")
    engines.client(one, facts=facts("0"))
    with pytest.raises(EngineError, match=r"given GPU 1; set spark\.engine_process to sidecar"):
        engines.client(one, facts=facts("1"))
    engines.close()


def test_specs_share_an_engine_only_when_their_engine_settings_agree() -> None:
    assert spec("a").fingerprint() == spec("a", process="sidecar", cores=3).fingerprint()
    assert len({spec("a").fingerprint(), spec("b").fingerprint(), spec("a", dtype="float32").fingerprint()}) == 3
