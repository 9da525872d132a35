"""Compiles the C++ kernels at first use and keeps the library in a cache directory.

The library is linked against the OpenMP runtime that torch has already loaded: a second one would bring a second pool
of spinning threads to the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dspark_batch.models.locks import exclusive
from dspark_batch.models.sources import CACHE_VARIABLE, cache_dir

logger = logging.getLogger(__name__)

SWITCH_VARIABLE = "DSPARK_BATCH_KERNELS"
_SOURCE_DIR = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
_COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


def build(*, extra_flags: Sequence[str] = (), directory: Path | None = None) -> Path:
    """Path of the compiled library; compiles it where the cache lacks it.

    The key covers sources, flags, compiler and CPU features. Concurrent processes wait for one another.

    Raises:
        BuildError: no compiler, no loaded OpenMP runtime, a failed compile, or an unwritable cache.
    """
    compiler = find_compiler()
    flags = (*_FLAGS, *extra_flags)
    target = (directory or cache_dir()) / "kernels" / f"{_key(compiler, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.parent / ".lock"):
            if not target.exists():
                _compile(compiler, flags, target)
    except OSError as error:
        raise BuildError(f"the kernel cache {target.parent} cannot be used: {error}; set {CACHE_VARIABLE}") from error
    return target


def find_compiler() -> str:
    """``$CXX``, else g++, clang++ or c++ of the PATH. Raises BuildError where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler: neither $CXX nor g++, clang++ or c++ on the PATH")


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    runtime = loaded_openmp()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unit, library = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([compiler, *flags, "-c", str(_SOURCE_DIR / "kernels.cpp"), "-o", str(unit)])
        _run([compiler, "-shared", str(unit), str(runtime), "-o", str(library)])
        os.replace(library, target)
    logger.info("compiled kernels to %s", target)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed: {error.stderr[-2000:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command)} failed: {error}") from error


def loaded_openmp() -> Path:
    """The OpenMP runtime of this process; torch's own where several are mapped.

    Raises:
        BuildError: none is mapped, or the system does not tell.
    """
    found = [path for path in _mapped_files() if path.name.startswith(_OPENMP_NAMES)]
    found.sort(key=lambda path: "torch" not in path.parts)
    if not found:
        raise BuildError("no OpenMP runtime is loaded in this process; torch was built without one")
    return found[0]


def _mapped_files() -> list[Path]:
    try:
        with open("/proc/self/maps") as lines:
            names = {line.split(maxsplit=5)[-1].strip() for line in lines if line.count("/")}
    except OSError:
        return []
    return [Path(name) for name in sorted(names)]


def _key(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_DIR.glob("*.[ch]pp")):
        digest.update(source.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version failed: {error}") from error
    for part in (version, " ".join(flags).encode(), platform.machine().encode(), _cpu_flags()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:24]


def _cpu_flags() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return b""


def open_library(path: Path) -> ctypes.CDLL:
    """Raises BuildError where the file is no library that this process can load."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}; delete it to compile it again") from error
