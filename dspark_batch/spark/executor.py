"""Inside an executor's Python worker: which devices and threads the task has, and the engine that the process keeps."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyspark import TaskContext

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.spark.client import EngineClient, EngineSpec
from dspark_batch.spark.host import EngineHost
from dspark_batch.spark.sidecar.client import SidecarClient
from dspark_batch.spark.sidecar.launch import SidecarPlace

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
NUM_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """What Spark gave the running task: GPU addresses (none without GPU scheduling), cores, the executor's folder."""

    gpus: tuple[str, ...]
    num_cpus: int
    executor_dir: str


@dataclass(slots=True)
class _Cached:
    key: str
    host: EngineHost


class ProcessEngines:
    """The engine of this Python worker, kept from task to task.

    Spark runs one task after another in the same Python worker as long as it is used at least once a minute. The
    engine has to outlive its task, so exactly one object of this class lives at module level; the module is imported,
    never pickled, so that all tasks of a process see the same one. It holds one engine at most; another spec replaces
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: _Cached | None = None
        self._gpus: tuple[str, ...] | None = None

    def client(self, spec: EngineSpec, *, facts: TaskFacts | None = None) -> EngineClient:
        """The engine for a task: this process's own, or a connection to the executor's sidecar.

        Threads and visible GPUs are set before the engine's libraries load. Raises ModelError, ConfigError or
        EngineError.
        """
        found = facts or task_facts()
        if uses_sidecar(spec, found):
            environment = sidecar_environment(spec, found)
            config = _with_threads(spec.config, int(environment[NUM_THREADS]))
            return SidecarClient(
                replace(spec, config=config), place=sidecar_place(spec, found), environment=environment
            )
        with self._lock:
            return _Borrowed(self._own(spec, found))

    def close(self) -> None:
        """Free the engine that this process holds, if any."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._cached is not None:
            self._cached.host.close()
            self._cached = None

    def _own(self, spec: EngineSpec, facts: TaskFacts) -> EngineHost:
        key = spec.fingerprint()
        if self._gpus not in (None, facts.gpus):
            raise EngineError(
                f"this Python worker holds an engine on GPU {', '.join(self._gpus or ()) or 'none'}, and the task was "
                f"given GPU {', '.join(facts.gpus) or 'none'}; set spark.engine_process to sidecar, or give every "
                "executor one task at a time (spark.task.resource.gpu.amount = spark.executor.resource.gpu.amount)"
            )
        if self._cached is not None and self._cached.key == key and not self._cached.host.is_broken:
            return self._cached.host
        self._drop()
        prepare_process(spec.config, facts)
        self._gpus = facts.gpus
        host = EngineHost(_with_threads(spec.config, facts.num_cpus), factory=spec.factory)
        self._cached = _Cached(key, host)
        return self._cached.host


class _Borrowed:
    """The process's engine under a task; the end of the task does not end it."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self.submit = host.submit
        self.release = host.release

    @property
    def max_concurrency(self) -> int:
        return self._host.max_concurrency

    def close(self) -> None:
        return


process_engines = ProcessEngines()


def task_facts() -> TaskFacts:
    """Facts of the task that this process runs; outside of Spark, no GPUs and every core."""
    context = TaskContext.get()
    resources = {} if context is None else context.resources()
    gpu = resources.get("gpu")
    return TaskFacts(
        gpus=tuple(gpu.addresses) if gpu is not None else (),
        num_cpus=num_usable_cores() if context is None else max(1, int(context.cpus())),
        executor_dir=os.environ.get("SPARK_LOCAL_DIRS", tempfile.gettempdir()).split(",")[0],
    )


def prepare_process(config: EngineConfig, facts: TaskFacts) -> None:
    """Set what the engine's libraries read when they load: the task's GPUs, and the engine's threads.

    By default these are as many as the task has cores. Spark's own value, the same, would hold even where
    ``engine.threads`` asks for more.
    """
    if facts.gpus:
        os.environ[VISIBLE_DEVICES] = visible_devices(facts.gpus, inherited=os.environ.get(VISIBLE_DEVICES))
    if "torch" not in sys.modules:
        os.environ[NUM_THREADS] = str(facts.num_cpus if config.threads == "auto" else config.threads)


def uses_sidecar(spec: EngineSpec, facts: TaskFacts) -> bool:
    """Whether the task's engine lives in a process of its own."""
    process = spec.settings.engine_process
    return process == "sidecar" or (process == "auto" and bool(facts.gpus))


def sidecar_place(spec: EngineSpec, facts: TaskFacts) -> SidecarPlace:
    """One place per executor, engine and GPU set: tasks on other GPUs get another sidecar."""
    return SidecarPlace.of(Path(facts.executor_dir), spec.fingerprint(), *facts.gpus)


def sidecar_environment(spec: EngineSpec, facts: TaskFacts) -> dict[str, str]:
    """Variables of the sidecar: its GPUs, and every core of the executor rather than one task's share."""
    variables = {}
    if facts.gpus:
        variables[VISIBLE_DEVICES] = visible_devices(facts.gpus, inherited=os.environ.get(VISIBLE_DEVICES))
    threads = spec.config.threads
    variables[NUM_THREADS] = str(sidecar_threads(spec) if threads == "auto" else threads)
    return variables


def sidecar_threads(spec: EngineSpec) -> int:
    """Cores of the executor, as far as they are known and usable."""
    return min(spec.executor_cores or num_usable_cores(), num_usable_cores())


def _with_threads(config: EngineConfig, num_threads: int) -> EngineConfig:
    return config if config.threads != "auto" else config.model_copy(update={"threads": num_threads})


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices(addresses: Sequence[str], *, inherited: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a task with these GPU addresses.

    Spark's addresses are the machine's own numbers. Where the executor was started with a list of devices already,
    addresses that are in it stand for themselves; else they are places in that list.
    """
    given = [entry.strip() for entry in (inherited or "").split(",") if entry.strip()]
    if given and not all(address in given for address in addresses):
        places = [int(address) for address in addresses if address.isdecimal()]
        if len(places) == len(addresses) and all(place < len(given) for place in places):
            return ",".join(given[place] for place in places)
    return ",".join(addresses)
