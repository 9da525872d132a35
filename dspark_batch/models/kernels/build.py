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

    Its name covers sources, flags, CPU features, OpenMP runtime and compiler. A machine without a compiler takes what
    another of its kind left in the cache, the newest where compilers differ. Concurrent processes wait for one another.

    Raises:
        BuildError: no compiler and no library, no loaded OpenMP runtime, a failed compile, or an unwritable cache.
    """
    compiler, runtime = find_compiler(), loaded_openmp()
    flags = (*_FLAGS, *extra_flags)
    folder = (directory or cache_dir()) / "kernels"
    key = _digest(
        _source_bytes(), " ".join(flags).encode(), platform.machine().encode(), _cpu_flags(), runtime.name.encode()
    )
    try:
        if compiler is None:
            return _newest(folder, key)
        target = folder / f"{key}-{_digest(_version(compiler))}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".lock"):
            if not target.exists():
                _compile(compiler, flags, target)
    except OSError as error:
        raise BuildError(f"the kernel cache {folder} cannot be used: {error}; set {CACHE_VARIABLE}") from error
    return target


def find_compiler() -> str | None:
    """``$CXX``, else g++, clang++ or c++ of the PATH."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _newest(folder: Path, key: str) -> Path:
    found = sorted(folder.glob(f"{key}-*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BuildError(
            "no C++ compiler: neither $CXX nor g++, clang++ or c++ on the PATH; and no machine of this kind has "
            f"compiled them into {folder}"
        )
    return found[-1]


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


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _source_bytes() -> bytes:
    return b"".join(source.read_bytes() for source in sorted(_SOURCE_DIR.glob("*.[ch]pp")))


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version failed: {error}") from error


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
