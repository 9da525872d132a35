"""A driver process that is kept for the next job: to start Python, Ray and its helpers costs more than a small job.

``python -m dspark_batch.testing.kill_driver ADDRESS`` joins a cluster and then runs the command lines that it reads
from its standard input, one JSON object a line. It ends as a process of the command line would where one does not end
well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class DriverProcess:
    """The other side: a driver that waits, runs a command, or has ended."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, address: str, *, environment: Mapping[str, str]) -> DriverProcess:
        """A driver in a session of its own, as from a shell."""
        command = [sys.executable, "-m", "dspark_batch.testing.kill_driver", address]
        devnull = subprocess.DEVNULL
        return cls(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=devnull,
                stderr=devnull,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def run(self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Command:
        """Have it run a command line with these variables (empty: unset), its output in ``log``."""
        command = Command(self, log)
        values = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(values).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait(timeout=10)
        return command

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that a driver runs or ran."""

    driver: DriverProcess
    log: Path

    def poll(self) -> int | None:
        """Its exit code; that of its process where that ended; None while it runs."""
        ended = self.driver.process.poll()
        done = _done_file(self.log)
        if done.exists() and (text := done.read_text()):
            return int(text)
        return ended

    def send_signal(self, number: signal.Signals) -> None:
        self.driver.process.send_signal(number)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def serve(address: str) -> int:
    """Run commands until one does not end with 0, or there are no more; its exit code."""
    from dspark_batch.ray_data.environment import prepare_driver_environment

    prepare_driver_environment(address)
    import ray
    import ray.data

    from dspark_batch.cli import run_cli
    from dspark_batch.job.config import RaySection
    from dspark_batch.ray_data.cluster import ray_session

    with ray_session(RaySection(address=address)):
        assert ray.is_initialized()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for line in sys.stdin:
            values = json.loads(line)
            for name, value in values["environment"].items():
                os.environ[name] = value
            with open(values["log"], "wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = int(run_cli(values["arguments"]))
            sys.stdout.flush()
            sys.stderr.flush()
            if code != 0:
                return code
            _done_file(Path(values["log"])).write_text(str(code))
    return 0


def _done_file(log: Path) -> Path:
    return log.with_suffix(".exit")


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
