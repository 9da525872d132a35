"""Finding, waiting for and ending processes in tests."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie (Linux)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pids: Iterable[int], *, timeout_s: float = 60.0) -> None:
    """Raises AssertionError where a process is still there at the end of the time."""
    left = set(pids)
    deadline_s = time.monotonic() + timeout_s
    while left:
        left = {pid for pid in left if is_running(pid)}
        assert time.monotonic() < deadline_s, f"still running: {sorted(left)}"
        time.sleep(0.1)


def processes_with(variable: str, value: str) -> list[int]:
    """Processes that were started with this environment variable, by whatever parent (Linux)."""
    entry = f"{variable}={value}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                if entry in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def kill_processes_with(variable: str, value: str, *, timeout_s: float = 30.0) -> None:
    """SIGKILL to all of them, and to what they start meanwhile, until none is left."""
    deadline_s = time.monotonic() + timeout_s
    while left := [pid for pid in processes_with(variable, value) if is_running(pid)]:
        assert time.monotonic() < deadline_s, f"still running: {left}"
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
