"""Builds the engine of a worker: the real one, or another that a ``module:function`` name stands for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import cast

from dspark_batch.batch.contract import RowEngine
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, DSparkBatchError, ModelError, Problem

ENGINE_FACTORY_VARIABLE = "DSPARK_BATCH_ENGINE_FACTORY"
"""Environment variable with a ``module:function`` that makes the engine from an ``EngineConfig``, for tests."""


def configured_factory() -> str | None:
    """The factory named in the environment of this process, or None for the real engine."""
    return os.environ.get(ENGINE_FACTORY_VARIABLE) or None


def make_engine(config: EngineConfig, *, factory: str | None = None) -> RowEngine:
    """An engine ready to take rows; loads the model.

    Raises:
        ModelError: the checkpoint is missing or not supported, or there is not enough memory for it, or anything else
            went wrong while it was loaded; the message says what.
        ConfigError: a setting does not fit the model, or ``factory`` is not an importable ``module:function``.
    """
    make = _real_engine if factory is None else _load(factory)
    try:
        return make(config)
    except DSparkBatchError:
        raise
    except Exception as error:
        raise ModelError(_loading_failed(config, error)) from error


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings that this package logs meanwhile, in any thread, each text once."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (text := record.getMessage()) not in texts:
                texts.append(text)

    collector, logger = Collector(logging.WARNING), logging.getLogger("dspark_batch")
    logger.addHandler(collector)
    try:
        yield texts
    finally:
        logger.removeHandler(collector)


def _real_engine(config: EngineConfig) -> RowEngine:
    from dspark_batch.engine.engine import BatchEngine

    return cast(RowEngine, BatchEngine.from_config(config))


def _loading_failed(config: EngineConfig, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[:1]
    text = f"model {config.target!r} cannot be loaded: {type(error).__name__}: {' '.join(first_line)}"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        text += " (lower engine.kv_cache_gib or engine.max_concurrency, or use a smaller model or a larger device)"
    return text


def _load(factory: str) -> Callable[[EngineConfig], RowEngine]:
    module, _, function = factory.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"{factory!r} is no importable module:function: {error}"
        raise ConfigError([Problem(ENGINE_FACTORY_VARIABLE, message, "environment")]) from error
    return cast(Callable[[EngineConfig], RowEngine], found)
