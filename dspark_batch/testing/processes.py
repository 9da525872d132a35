"""Waiting for processes in tests."""

from __future__ import annotations

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
