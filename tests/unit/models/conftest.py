"""Tiny checkpoints and targets for the tests of ``dspark_batch.models``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.testing.tiny import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def _private_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the embedded model's conversion and the kernels is kept in the user's cache."""
    load_kernels()  # before: in an empty cache they would be compiled again
    if "model" not in request.keywords:
        monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run on one thread: more would only wait for each other."""
    num_threads = torch.get_num_threads()
    if "model" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, **overrides)``: a tiny checkpoint's folder, written once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = save_tiny_checkpoint(tmp_path_factory.mktemp(family), family, **overrides)
        return made[key]

    return make
