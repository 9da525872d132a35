"""Joins or starts Ray, and shares its CPUs and GPUs out among the actors."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from dspark_batch.errors import ConfigError, EngineError, Problem
from dspark_batch.job.config import RaySection
from dspark_batch.ray_data.environment import cluster_address

LOCAL_OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Only shard descriptors and commit records pass through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorShare:
    """What one actor takes of the cluster, and the CPU threads that its model may use."""

    num_cpus: float
    num_gpus: float

    @property
    def num_threads(self) -> int:
        return max(1, math.floor(self.num_cpus))


@contextmanager
def ray_session(section: RaySection) -> Iterator[None]:
    """Ray for the time of the block: one that runs in this process stays, else join, else start on the loopback.

    What the block found running it leaves running; what it started or joined it leaves.

    Raises:
        ConfigError: the cluster at ``ray.address`` (or ``RAY_ADDRESS``) cannot be reached.
        EngineError: Ray does not start on this machine.
    """
    _quiet_loggers()
    if ray.is_initialized():
        yield
        return
    address = cluster_address(section.address)
    if address is None:
        try:
            with _without_log_level_line():
                ray.init(
                    address="local",
                    num_cpus=len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray raises that class itself where its processes take too long on a busy machine.
            raise EngineError(f"Ray does not start on this machine: {error}") from error
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError([Problem("ray.address", f"no Ray cluster answers at {address!r}: {error}")]) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Ray's own code writes to the standard error that it was told to be quiet; everything else is passed on."""
    sys.stderr.flush()
    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)
            written.seek(0)
            for line in written:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


def actor_share(section: RaySection, *, device: str) -> ActorShare:
    """The CPUs and GPUs of one actor: as configured, else an even share of what the nodes of the cluster have."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_of(nodes, section=section, device=device)


def share_of(nodes: Sequence[Mapping[str, float]], *, section: RaySection, device: str) -> ActorShare:
    """The same from the resources of every node. A range of actors shares the CPUs as if all were there, one CPU each
    at least; those that do not fit yet wait for nodes that a cluster autoscaler adds.

    Raises:
        ConfigError: the cluster cannot place the fewest ``ray.actors`` with the configured ``ray.num_cpus`` and
            ``ray.num_gpus``, or a range was given for actors with GPUs.
    """
    can_use_gpu = device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    num_gpus = float(can_use_gpu) if section.num_gpus == "auto" else section.num_gpus
    actors = section.actors
    if num_gpus > 0 and not actors.is_fixed:
        message = (
            f"{actors.min} to {actors.max} actors with {num_gpus:g} GPUs each: a pool on GPUs has a fixed size, as Ray "
            f"does not grow one reliably; give a number, such as {actors.max}, or ray.num_gpus=0"
        )
        raise ConfigError([Problem("ray.actors", message)])
    num_cpus = _even_share(nodes, actors=actors.max, num_gpus=num_gpus)
    if not actors.is_fixed and num_cpus < 1:
        num_cpus = 1.0
    if section.num_cpus != "auto":
        num_cpus = section.num_cpus
    placed = sum(_places(node, num_cpus=num_cpus, num_gpus=num_gpus) for node in nodes)
    if placed < actors.min:
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        message = (
            f"{actors.min} actors with {num_cpus:g} CPUs and {num_gpus:g} GPUs each do not fit; room for {placed}; "
            f"the nodes have: {have}"
        )
        raise ConfigError([Problem("ray.actors", message)])
    return ActorShare(num_cpus=num_cpus, num_gpus=num_gpus)


def _even_share(nodes: Sequence[Mapping[str, float]], *, actors: int, num_gpus: float) -> float:
    """The largest whole number of CPUs that still places all actors; a fraction where there are too few CPUs."""
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    for num_cpus in range(most, 0, -1):
        if sum(_places(node, num_cpus=num_cpus, num_gpus=num_gpus) for node in nodes) >= actors:
            return float(num_cpus)
    total = sum(node.get("CPU", 0) for node in nodes)
    return math.floor(100 * total / actors) / 100


def _places(node: Mapping[str, float], *, num_cpus: float, num_gpus: float) -> int:
    by_cpu = math.floor(node.get("CPU", 0) / num_cpus + 1e-9) if num_cpus > 0 else math.inf
    by_gpu = math.floor(node.get("GPU", 0) / num_gpus + 1e-9) if num_gpus > 0 else math.inf
    places = min(by_cpu, by_gpu)
    return 10**6 if math.isinf(places) else int(places)


def _quiet_loggers() -> None:
    """Ray Data logs its own stack trace of every failure, which would bury the error that the run raises."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
