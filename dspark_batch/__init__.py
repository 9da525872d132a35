"""Lossless speculative decoding for offline LLM generation over tables.

Names resolve lazily: ``import dspark_batch`` loads neither torch nor Ray nor Spark.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.batch.commit import read_output
    from dspark_batch.core import ErrorCode, FinishReason, Message, Request, Result, RowError, SamplingParams
    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.job.outcome import Outcome
    from dspark_batch.job.runner import run_job

__version__ = "0.1.0"

_HOMES = {
    "BatchEngine": "dspark_batch.engine.engine",
    "EngineConfig": "dspark_batch.engine.config",
    "ErrorCode": "dspark_batch.core",
    "FinishReason": "dspark_batch.core",
    "Message": "dspark_batch.core",
    "Outcome": "dspark_batch.job.outcome",
    "Request": "dspark_batch.core",
    "Result": "dspark_batch.core",
    "RowError": "dspark_batch.core",
    "SamplingParams": "dspark_batch.core",
    "read_output": "dspark_batch.batch.commit",
    "run_job": "dspark_batch.job.runner",
}

__all__ = [
    "BatchEngine",
    "EngineConfig",
    "ErrorCode",
    "FinishReason",
    "Message",
    "Outcome",
    "Request",
    "Result",
    "RowError",
    "SamplingParams",
    "__version__",
    "read_output",
    "run_job",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
