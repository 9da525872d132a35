"""Engines for whole-pipeline tests, by name (``DSPARK_BATCH_ENGINE_FACTORY``) and set up by the environment."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from dspark_batch.core import ErrorCode, FinishReason, Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, EngineError, ModelError, Problem
from dspark_batch.testing.scripted_engine import Sample, ScriptedEngine, prompt_text

STEP_DELAY_VARIABLE = "DSPARK_BATCH_TEST_STEP_DELAY_S"
FAILURES_VARIABLE = "DSPARK_BATCH_TEST_FAILURES"
FAULT_AFTER_VARIABLE = "DSPARK_BATCH_TEST_FAULT_AFTER"


class SlowEngine(ScriptedEngine):
    """A scripted engine whose every step takes ``step_delay_s``, so that a test can act in the middle of a run."""

    def __init__(
        self, *, step_delay_s: float, failures: dict[str, ErrorCode] | None = None, fault_after_rows: int | None = None
    ) -> None:
        super().__init__(failures=failures, fault_after_rows=fault_after_rows)
        self._step_delay_s = step_delay_s

    def step(self) -> list[tuple[int, Result]]:
        time.sleep(self._step_delay_s)
        return super().step()


class RefusingEngine(ScriptedEngine):
    """Fails a test in which rows reach an engine that should not be asked."""

    def add(self, request: Request) -> int:
        raise EngineError(f"request {request.id!r} reached an engine that must not be used")


class EchoingEngine(ScriptedEngine):
    """Answers with a line of the prompt, sample by sample; a character is a token, and ``max_new_tokens`` cuts."""

    def _result(self, sample: Sample) -> Result:
        result = super()._result(sample)
        if result.error is not None:
            return result
        lines = prompt_text(sample.request).splitlines()
        whole = lines[sample.sample % len(lines)]
        text = whole[: sample.request.sampling.max_new_tokens]
        return replace(
            result,
            text=text,
            token_ids=tuple(map(ord, text)),
            finish_reason=FinishReason.STOP if text == whole else FinishReason.LENGTH,
            num_generated_tokens=len(text),
        )


def scripted(config: EngineConfig) -> ScriptedEngine:
    """A scripted engine.

    ``DSPARK_BATCH_TEST_STEP_DELAY_S`` slows its steps, ``DSPARK_BATCH_TEST_FAILURES`` (``prompt=code;prompt=code``)
    makes rows fail, ``DSPARK_BATCH_TEST_FAULT_AFTER`` breaks it after that many rows.
    """
    fault_after = os.environ.get(FAULT_AFTER_VARIABLE)
    return SlowEngine(
        step_delay_s=float(os.environ.get(STEP_DELAY_VARIABLE, "0")),
        failures=_failures(),
        fault_after_rows=None if fault_after is None else int(fault_after),
    )


def refusing(config: EngineConfig) -> RefusingEngine:
    """An engine that takes no row."""
    return RefusingEngine()


def echoing(config: EngineConfig) -> EchoingEngine:
    """An engine whose texts a test writes as prompts. ``DSPARK_BATCH_TEST_FAILURES`` makes rows fail."""
    return EchoingEngine(failures=_failures())


def missing(config: EngineConfig) -> ScriptedEngine:
    """Stands for a model that cannot be loaded."""
    raise ModelError(f"model {config.target!r}: no such checkpoint (scripted)")


def too_large(config: EngineConfig) -> ScriptedEngine:
    """Stands for a model that does not fit into memory."""
    raise MemoryError("Unable to allocate 160 GiB (scripted)")


def contradicting(config: EngineConfig) -> ScriptedEngine:
    """Stands for a setting that only the loaded model shows to be wrong."""
    raise ConfigError([Problem("engine.max_context", "99 is more than the model's 9 (scripted)")])


def breaking(config: EngineConfig) -> ScriptedEngine:
    """Breaks after some rows in every process: a run gets through by replacing its processes."""
    return ScriptedEngine(fault_after_rows=30)


def broken(config: EngineConfig) -> ScriptedEngine:
    """Breaks at its first step, always."""
    return ScriptedEngine(fault_after_rows=0)


def _failures() -> dict[str, ErrorCode]:
    pairs = [pair.rsplit("=", 1) for pair in os.environ.get(FAILURES_VARIABLE, "").split(";") if pair]
    return {prompt: ErrorCode(code) for prompt, code in pairs}
