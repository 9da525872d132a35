"""A Ray cluster of one node that takes jobs, on the loopback of this machine, as ``ray start --head`` makes it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dspark_batch.ray_data.environment import LOCAL_SETTINGS

START_PATIENCE_S = 120.0
STOP_PATIENCE_S = 20.0
RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
"""The ``ray`` command of this interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHead:
    """A running head. ``job_address`` is for ``ray job``; ``environment`` marks every process of the cluster."""

    job_address: str
    environment: Mapping[str, str]

    def ray(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run one ``ray`` command to its end, such as ``ray("job", "status", name)``; the address is filled in."""
        command = [*RAY, *arguments[:2], "--address", self.job_address, *arguments[2:]]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=dict(self.environment), check=False
        )

    def submit(self, name: str, *, working_dir: Path, entrypoint: Sequence[str]) -> str:
        """``ray job submit``, which waits for the job; what it prints."""
        options = ["--submission-id", name, "--working-dir", str(working_dir)]
        done = self.ray("job", "submit", *options, "--", *entrypoint, timeout_s=180)
        return done.stdout + done.stderr

    def submit_and_go_on(self, name: str, *, working_dir: Path, entrypoint: Sequence[str]) -> None:
        """As ``submit``, without waiting for the job's end. Raises AssertionError where it is refused."""
        options = ["--no-wait", "--submission-id", name, "--working-dir", str(working_dir)]
        done = self.ray("job", "submit", *options, "--", *entrypoint)
        assert done.returncode == 0, done.stderr

    def processes(self) -> list[int]:
        """Processes of this cluster and its jobs."""
        marker = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if marker in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


@contextmanager
def ray_head(variables: Mapping[str, str]) -> Iterator[RayHead]:
    """A head whose jobs see these environment variables. Needs ``ray[default]``."""
    with tempfile.TemporaryDirectory(prefix="dsk", ignore_cleanup_errors=True) as folder:
        ports = _free_ports(4)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        settings = {**LOCAL_SETTINGS, "RAY_AUTH_MODE": "disabled", "PATH": path, "RAY_TMPDIR": folder}
        environment = {**os.environ, **settings, **variables}
        environment.pop("RAY_ADDRESS", None)
        head = RayHead(job_address=f"http://127.0.0.1:{ports[0]}", environment=environment)
        options = {
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": ports[0],
            "port": ports[1],
            "ray-client-server-port": ports[2],
            "dashboard-agent-listen-port": ports[3],
            "num-cpus": 2,
            "object-store-memory": 96 * 1024 * 1024,
            "temp-dir": folder,
        }
        command = [*RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        log = Path(folder) / "head.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            _wait_until_it_takes_jobs(head, process, log=log)
            yield head
        finally:
            _end(head, process)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [int(opened.getsockname()[1]) for opened in sockets]


def _wait_until_it_takes_jobs(head: RayHead, process: subprocess.Popen[bytes], *, log: Path) -> None:
    deadline_s = time.monotonic() + START_PATIENCE_S
    while True:
        # A dashboard that is starting answers some paths before others, and not always in JSON.
        with contextlib.suppress(OSError, ValueError):
            for path in ("api/version", "api/jobs/"):
                with urllib.request.urlopen(f"{head.job_address}/{path}", timeout=5) as answer:
                    json.loads(answer.read())
            return
        text = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"ray start ended with code {process.returncode}:\n{text}"
        assert time.monotonic() < deadline_s, f"ray start takes no jobs after {START_PATIENCE_S:.0f} s:\n{text}"
        time.sleep(0.3)


def _end(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    """End every process of the cluster, by id. Raises AssertionError where one stays."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_PATIENCE_S / 2)
    deadline_s = time.monotonic() + STOP_PATIENCE_S
    while left := head.processes():
        assert time.monotonic() < deadline_s, f"still running: {left}"
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait(timeout=STOP_PATIENCE_S)
