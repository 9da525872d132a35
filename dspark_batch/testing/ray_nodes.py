"""A Ray cluster of two nodes on the loopback of this machine, whose processes tests and the kill matrix may kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_batch.ray_data.environment import LOCAL_SETTINGS
from dspark_batch.testing.kill_driver import DriverProcess

ACTOR_TITLE = "ray::MapWorker"
"""Begins the process title of an actor of ``map_batches``."""

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
"""A killed node counts as lost after about two seconds instead of fifteen; a slow one still has twenty."""

WORKERS = {"RAY_worker_niceness": "0"}
"""Workers get the processor time of any process here: they are what the runs wait for."""

OBJECT_STORE_BYTES = 96 * 1024 * 1024
EXIT_PATIENCE_S = 15.0


class TwoNodes:
    """A head and a second node with one CPU each. Use ``two_nodes``.

    ``environment`` marks every process of the cluster.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        from ray.cluster_utils import Cluster

        self.environment = dict(environment)
        self._node_args: dict[str, Any] = {
            "num_cpus": 1,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args={**self._node_args, "include_dashboard": False})
        self._second: Any = self._cluster.add_node(**self._node_args)
        self._driver: DriverProcess | None = None

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def strike_second_raylet(self, number: signal.Signals) -> None:
        """Send the signal to the second node's raylet and wait until it is gone, by SIGKILL if need be."""
        process = self._raylet()
        process.send_signal(number)
        try:
            process.wait(timeout=EXIT_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=EXIT_PATIENCE_S)

    def driver(self) -> DriverProcess:
        """A driver that waits for a command: the one of the last command if it still lives, else a new one."""
        if self._driver is None or not self._driver.is_alive:
            if self._driver is not None:
                self._driver.kill()
            self._driver = DriverProcess.start(self.address, environment=self.environment)
        return self._driver

    def restore_second(self) -> None:
        """A new second node in the place of one whose raylet is gone; nothing where it lives. Waits until it is up.

        Raises what Ray raises where it does not come up.
        """
        if self._second is not None and self._raylet().poll() is None:
            return
        if self._second is not None:
            self._cluster.remove_node(self._second, allow_graceful=False)
            self._second = None
        self._second = self._cluster.add_node(**self._node_args)

    def processes(self, *, title: str = "") -> list[int]:
        """Processes of this cluster and its drivers, by the beginning of their title."""
        marker = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if command.startswith(title.encode()) and marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End every process of the cluster, by id. Raises AssertionError where one stays."""
        if self._driver is not None:
            self._driver.kill()
        with contextlib.suppress(AssertionError, OSError, RuntimeError):
            self._cluster.shutdown()
        deadline_s = time.monotonic() + EXIT_PATIENCE_S
        while left := self.processes():
            assert time.monotonic() < deadline_s, f"still running: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _raylet(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = self._second.all_processes["raylet"][0].process
        return process


@contextmanager
def two_nodes(environment: Mapping[str, str]) -> Iterator[TwoNodes]:
    """A running cluster whose processes see these variables too."""
    with tempfile.TemporaryDirectory(prefix="dsk", ignore_cleanup_errors=True) as folder:
        settings = {
            **LOCAL_SETTINGS,
            **HEALTH_CHECKS,
            **WORKERS,
            **environment,
            "RAY_TMPDIR": folder,
            "RAY_ADDRESS": "",
        }
        with changed_environment(settings):
            nodes = TwoNodes(settings)
            try:
                yield nodes
            finally:
                nodes.close()


@contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
