"""Where a run came from: versions, device facts, config fingerprints; and file writes that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REPORTED_PACKAGES = (
    "dspark-batch",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "jinja2",
    "ray",
    "pyspark",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The machine, as the operating system describes it. ``memory_bytes`` is None where it cannot be read."""

    host: str
    system: str
    cpu: str
    num_cpus: int
    memory_bytes: int | None
    gpus: tuple[str, ...]


def versions() -> dict[str, str]:
    """Version by package name, for Python and every reported package that is installed. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_facts() -> DeviceFacts:
    """Host, CPU, memory and NVIDIA GPUs, without importing torch. ``num_cpus`` is what this process may use."""
    return DeviceFacts(
        host=platform.node(),
        system=platform.platform(),
        cpu=_first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        gpus=_gpu_names(),
    )


def fingerprint(fields: Mapping[str, object]) -> str:
    """SHA-256 (hex) of the fields as canonical JSON: keys sorted, no spaces, so that key order does not matter.

    Raises:
        TypeError: a value is not JSON.
        ValueError: a value is NaN or infinite.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """A line for every field that differs, by name."""
    differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return [f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differing]


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, also after a crash or power cut.

    Stages in the same folder (made where missing), fsyncs, renames, fsyncs the folder. Raises OSError; the staging
    file is then removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """``atomic_write_bytes`` of the text in UTF-8."""
    atomic_write_bytes(path, text.encode())


def fsync_folder(path: Path) -> None:
    """Make renames in a folder durable. Does nothing where the system cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_value(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key and value.strip():
            return value.strip()
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_names() -> tuple[str, ...]:
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return tuple(name for file in files if (name := _first_value(file, "Model")) is not None)
