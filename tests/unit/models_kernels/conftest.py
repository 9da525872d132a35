"""The builds of the kernels: for this CPU, for one without AVX-512, and the generic one that any CPU runs."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dspark_batch.models.kernels.build import build
from dspark_batch.models.kernels.library import Kernels

IS_X86 = platform.machine() == "x86_64"
FLAGS: dict[str, tuple[str, ...]] = {
    "native": (),
    **({"avx2": ("-mno-avx512f",)} if torch.cpu._is_avx512_supported() else {}),  # else the native build is the same
    "generic": ("-DDSPARK_GENERIC", *(("-mno-avx",) if IS_X86 else ())),
}


@pytest.fixture(scope="session", params=list(FLAGS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    flags = FLAGS[request.param]
    if not flags:
        return Kernels(build())  # that of every engine here: compiled once
    folder: Path = tmp_path_factory.getbasetemp().parent / "kernel-cache"
    return Kernels(build(extra_flags=flags, directory=folder))


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Spinning threads on a busy machine cost more than they save; tests of threads ask for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
