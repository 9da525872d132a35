"""The engine as training uses it. It is imported inside a function only: training and the engine stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dspark_batch.core import Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.models.text import TextCodec

Generate = Callable[[Iterable[Request]], Iterator[Result]]
"""Requests to results, in whatever order they finish. Failed rows come out with an error."""


@dataclass(frozen=True, slots=True)
class Generator:
    """generate: plain decoding by the target. codec: its tokenizer; None where it has none."""

    generate: Generate
    codec: TextCodec | None
    eos_token_ids: tuple[int, ...]


@contextmanager
def open_generator(config: EngineConfig) -> Iterator[Generator]:
    """Load the target into an engine, and free it at the end. Raises ConfigError, ModelError."""
    import torch

    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.loader import load_target

    if isinstance(config.threads, int):
        torch.set_num_threads(config.threads)
    loaded = load_target(config)
    with BatchEngine(loaded, config) as engine:
        yield Generator(engine.stream, loaded.codec, loaded.eos_token_ids)
