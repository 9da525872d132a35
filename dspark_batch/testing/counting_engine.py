"""A scripted engine that notes its loads and rows in files, so that tests can count them across processes.

``EngineConfig.target`` is a folder. ``options.json`` in it may hold ``step_delay_s``, ``max_concurrency``,
``die_once_after_rows``, ``hang_once_after_rows`` (with ``hang_holds_lock``: in native code that keeps the interpreter's
lock), ``break_on`` (prompts, to ``raise`` for an engine fault and ``exit`` for the end of the process),
``die_at_load``, ``warning`` (logged at each load), ``note_steps`` and ``wait_for_loads`` (no engine makes a step until
so many were made). ``loads.jsonl``, ``rows.txt`` and ``steps.jsonl`` are written.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_batch.core import Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.testing.scripted_engine import ScriptedEngine, prompt_text

FACTORY = "dspark_batch.testing.counting_engine:counting"
HANG_S = 3600
MOST_WAIT_S = 60.0
NOTED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """Reads what counting engines noted, and sets how they behave."""

    path: Path

    @classmethod
    def make(cls, path: Path, **options: Any) -> EngineFolder:
        path.mkdir(parents=True, exist_ok=True)
        (path / "options.json").write_text(json.dumps(options))
        return cls(path)

    def options(self) -> dict[str, Any]:
        file = self.path / "options.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def loads(self) -> list[dict[str, Any]]:
        """One entry per engine made: process id, threads of the config, and environment."""
        return [json.loads(line) for line in self._lines("loads.jsonl")]

    def rows(self) -> list[str]:
        """The prompt of every request that reached an engine, in order of arrival."""
        return [json.loads(line) for line in self._lines("rows.txt")]

    def steps(self) -> list[list[str]]:
        """The request ids that took part in each step, in order; empty without ``note_steps``."""
        return [json.loads(line) for line in self._lines("steps.jsonl")]

    def forget(self) -> None:
        for name in ("loads.jsonl", "rows.txt", "steps.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def note(self, name: str, value: object) -> None:
        """Appends one line; lines of several processes do not mix."""
        handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(value) + "\n").encode())
        finally:
            os.close(handle)

    def claim(self, name: str) -> bool:
        """True for exactly one caller."""
        try:
            os.close(os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _lines(self, name: str) -> list[str]:
        file = self.path / name
        return file.read_text().splitlines() if file.exists() else []


class CountingEngine(ScriptedEngine):
    """Notes every request; may end its process, or hang, once in the middle."""

    def __init__(self, folder: EngineFolder) -> None:
        options = folder.options()
        super().__init__(max_concurrency=options.get("max_concurrency", 4))
        self._folder = folder
        self._step_delay_s = float(options.get("step_delay_s", 0.0))
        self._die_after: int | None = options.get("die_once_after_rows")
        self._hang_after: int | None = options.get("hang_once_after_rows")
        self._hang_holds_lock = bool(options.get("hang_holds_lock"))
        self._note_steps = bool(options.get("note_steps"))
        self._wait_for_loads = int(options.get("wait_for_loads", 0))
        self._break_on: dict[str, str] = options.get("break_on", {})
        self._num_out = 0

    def add(self, request: Request) -> int:
        self._folder.note("rows.txt", prompt_text(request))
        return super().add(request)

    def step(self) -> list[tuple[int, Result]]:
        if self._wait_for_loads:
            self._wait()
        time.sleep(self._step_delay_s)
        for sample in (*self._running, *self._waiting):
            match self._break_on.get(prompt_text(sample.request)):
                case "raise":
                    raise EngineError(f"scripted fault over {sample.request.id}")
                case "exit":
                    os._exit(13)
        if self._die_after is not None and self._num_out >= self._die_after and self._folder.claim("died"):
            os._exit(13)
        if self._hang_after is not None and self._num_out >= self._hang_after and self._folder.claim("hung"):
            _hang(holds_lock=self._hang_holds_lock)
        out = super().step()
        self._num_out += len(out)
        if self._note_steps:
            done = [result.id for _, result in out]
            self._folder.note("steps.jsonl", [*done, *(sample.request.id for sample in self._running)])
        return out

    def _wait(self) -> None:
        end_s = time.monotonic() + MOST_WAIT_S
        while len(self._folder.loads()) < self._wait_for_loads and time.monotonic() < end_s:
            time.sleep(0.05)
        self._wait_for_loads = 0


def _hang(*, holds_lock: bool) -> None:
    if holds_lock:
        ctypes.PyDLL(None).sleep(HANG_S)
    else:
        time.sleep(HANG_S)


def counting(config: EngineConfig) -> CountingEngine:
    """The engine of the folder that ``config.target`` names."""
    folder = EngineFolder(Path(config.target))
    environment = {name: os.environ.get(name) for name in NOTED_VARIABLES}
    folder.note("loads.jsonl", {"pid": os.getpid(), "threads": config.threads, **environment})
    if warning := folder.options().get("warning"):
        logging.getLogger(__name__).warning(warning)
    if folder.options().get("die_at_load"):
        os._exit(13)
    return CountingEngine(folder)
