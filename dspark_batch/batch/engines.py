"""Builds the engine of a worker: the real one, or another that a ``module:function`` name stands for."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import cast

from dspark_batch.batch.contract import RowEngine
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, Problem

ENGINE_FACTORY_VARIABLE = "DSPARK_BATCH_ENGINE_FACTORY"
"""Environment variable with a ``module:function`` that makes the engine from an ``EngineConfig``, for tests."""


def configured_factory() -> str | None:
    """The factory named in the environment of this process, or None for the real engine."""
    return os.environ.get(ENGINE_FACTORY_VARIABLE) or None


def make_engine(config: EngineConfig, *, factory: str | None = None) -> RowEngine:
    """An engine ready to take rows; loads the model.

    Raises:
        ModelError: the checkpoint is missing or not supported.
        ConfigError: ``factory`` is not an importable ``module:function``.
    """
    if factory is None:
        from dspark_batch.engine.engine import BatchEngine

        return cast(RowEngine, BatchEngine.from_config(config))
    return _load(factory)(config)


def _load(factory: str) -> Callable[[EngineConfig], RowEngine]:
    module, _, function = factory.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"{factory!r} is no importable module:function: {error}"
        raise ConfigError([Problem(ENGINE_FACTORY_VARIABLE, message, "environment")]) from error
    return cast(Callable[[EngineConfig], RowEngine], found)
