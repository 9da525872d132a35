"""The engine as training uses it. It is imported inside a function only: training and the engine stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dspark_batch.core import Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.models.text import TextCodec
from dspark_batch.training.features import FeatureRecorder

Generate = Callable[[Iterable[Request]], Iterator[Result]]
"""Requests to results, in whatever order they finish. Failed rows come out with an error."""


@dataclass(frozen=True, slots=True)
class Generator:
    """generate: plain decoding by the target. codec: its tokenizer; None where it has none. recorder: what its layers
    said of finished rows, where that is kept."""

    generate: Generate
    codec: TextCodec | None
    eos_token_ids: tuple[int, ...]
    recorder: FeatureRecorder | None = None


@contextmanager
def open_generator(config: EngineConfig, *, kept_taps: Sequence[int] = ()) -> Iterator[Generator]:
    """Load the target into an engine, and free it at the end. kept_taps: record these layers and the last one.

    Raises:
        ConfigError: a layer to be kept does not exist, or as the engine says.
        ModelError: the target cannot be loaded.
    """
    import torch

    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.loader import load_target

    if isinstance(config.threads, int):
        torch.set_num_threads(config.threads)
    loaded = load_target(config)
    recorder = None
    if kept_taps:
        last = loaded.target.spec.num_layers - 1
        if not all(-1 <= tap <= last for tap in kept_taps):
            raise ConfigError([Problem("responses.kept_taps", f"{list(kept_taps)} must lie in -1 .. {last}")])
        recorder = FeatureRecorder(tuple(sorted({*kept_taps, last})))
    with BatchEngine(loaded, config, drafter=recorder) as engine:
        yield Generator(engine.stream, loaded.codec, loaded.eos_token_ids, recorder)
