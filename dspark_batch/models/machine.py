"""What this process may take of its machine: memory and CPUs, within the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    """Names of a group's files, and what its statistics call the cached pages that are given up first."""

    limit: str
    usage: str
    cached: str


_MEMORY_V1 = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_MEMORY_V2 = _MemoryFiles("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping and without exceeding a limit. ``root``: of /proc and /sys."""
    left = [_left(folder, _MEMORY_V2 if is_v2 else _MEMORY_V1) for folder, is_v2 in _groups(root, "memory")]
    return min([_available_on_machine(root), *(found for found in left if found is not None)])


def usable_cpus(root: Path = Path("/")) -> float:
    """CPUs that this process may run on, or the share of them that a quota leaves it."""
    quotas = [_quota(folder, is_v2) for folder, is_v2 in _groups(root, "cpu")]
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(affinity), *(found for found in quotas if found is not None)])


def _available_on_machine(root: Path) -> int:
    try:
        with open(root / "proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's groups and of those above them, and whether they are of version 2.

    In a container a group's path may be that of the host: its own limits are then at the top of what is mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = PurePosixPath(path.lstrip("/"))
        for folder in (own, *own.parents):
            yield top / folder, not controllers


def _left(folder: Path, files: _MemoryFiles) -> int | None:
    """Bytes below a group's limit, file pages that no one has used lately counted as free; None without a limit."""
    try:
        limit, usage = ((folder / name).read_text().strip() for name in (files.limit, files.usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(usage) + int(statistics.get(files.cached, 0)))


def _quota(folder: Path, is_v2: bool) -> float | None:
    """CPUs' worth of time that a group may use; None without a quota."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
