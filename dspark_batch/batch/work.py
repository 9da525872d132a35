"""What every engine of a run did over time, in ``_dspark/work/``: for reports and for cost accounting."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

from dspark_batch.batch.commit import FINGERPRINT_FILE, RunStore
from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import DSparkBatchError, OutputError
from dspark_batch.provenance import device_facts

WORK = "work"
MAX_MARKS = 241
FIRST_INTERVAL_S = 1.0
SAVE_INTERVAL_S = 30.0
MAX_POSITIONS = 32
COLUMNS = tuple(f.name for f in fields(LiveCounts))

logger = logging.getLogger(__name__)

Mark = tuple[float, LiveCounts]
"""A moment, as UNIX time, and what the engine had done until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """One engine, from the moment when it began to load. ``marks`` rise; the second is the end of loading.

    ``by_position``: verified and accepted tokens of each draft position, from the first, ``MAX_POSITIONS`` at most.
    ``device``: ``cpu`` or ``cuda``, None where the engine does not say; ``hardware``: the name of that.
    """

    run_id: str
    host: str
    pid: int
    device: str | None
    hardware: str
    marks: tuple[Mark, ...]
    by_position: tuple[tuple[int, int], ...] = ()

    @property
    def begin_s(self) -> float:
        return self.marks[0][0]

    @property
    def end_s(self) -> float:
        return self.marks[-1][0]

    @property
    def engine_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def load_s(self) -> float:
        return self.marks[1][0] - self.begin_s

    @property
    def total(self) -> LiveCounts:
        return self.marks[-1][1]

    def to_json(self) -> str:
        values = {
            "run_id": self.run_id,
            "host": self.host,
            "pid": self.pid,
            "device": self.device,
            "hardware": self.hardware,
            "columns": ["time_s", *COLUMNS],
            "marks": [[round(time_s, 3), *astuple(counts)] for time_s, counts in self.marks],
            "by_position": self.by_position,
        }
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str, *, source: str) -> EngineWork:
        """Raises OutputError where the text is no such record. Columns that it lacks count as 0."""
        try:
            values: dict[str, Any] = json.loads(text)
            columns = values["columns"]
            marks = [dict(zip(columns, mark, strict=True)) for mark in values["marks"]]
            work = cls(
                run_id=str(values["run_id"]),
                host=str(values["host"]),
                pid=int(values["pid"]),
                device=values["device"],
                hardware=str(values["hardware"]),
                marks=tuple((float(mark["time_s"]), _counts(mark)) for mark in marks),
                by_position=tuple((int(verified), int(accepted)) for verified, accepted in values["by_position"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(f"{source} does not say what an engine did: {error!r}; delete it") from error
        times = [time_s for time_s, _ in work.marks]
        if len(times) < 2 or times != sorted(times):
            raise OutputError(f"{source} does not say what an engine did: its times do not rise; delete it")
        return work


def _counts(mark: dict[str, Any]) -> LiveCounts:
    return LiveCounts(**{name: int(mark.get(name, 0)) for name in COLUMNS})


class WorkLog:
    """Looks at an engine from a thread of its own and saves what it did, every ``SAVE_INTERVAL_S`` and when it rests.

    Made before the engine, so that its loading counts. The engine's thread is not involved. Marks are as far apart as
    ``MAX_MARKS`` of them demand: where there are more, every second one is dropped. A record that cannot be saved is
    warned of once; no run ends for it.
    """

    def __init__(
        self,
        run: RunStore,
        *,
        counts: Callable[[], LiveCounts],
        by_position: Callable[[], Sequence[tuple[int, int]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._counts = counts
        self._by_position = by_position
        self._clock = clock
        self._unix_s = time.time() - clock()
        self._name = f"{WORK}/{run.run_id}-{uuid.uuid4().hex[:8]}.json"
        self._lock = threading.Lock()
        self._save_lock = threading.Lock()
        self._interval_s = FIRST_INTERVAL_S
        self._marks: list[Mark] = [self._now()]
        self._marked_s = self._saved_s = clock()
        self._num_shards = 0
        self._has_warned = False
        self._device: str | None = None
        self._hardware = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dspark-batch-work", daemon=True)

    def start(self, *, device: str | None) -> None:
        """The engine is loaded."""
        facts = device_facts()
        self._device = device
        self._hardware = facts.gpus[0] if device == "cuda" and facts.gpus else facts.cpu
        self._mark()
        self.save()
        self._thread.start()

    @contextmanager
    def shard(self) -> Iterator[None]:
        """While a shard is made. What the last of several did is saved before this returns."""
        with self._lock:
            self._num_shards += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_shards -= 1
                rests = self._num_shards == 0
            if rests:
                self.save()

    def look(self) -> None:
        """Note a mark and save, where it is time for that."""
        if self._clock() - self._marked_s >= self._interval_s:
            self._mark()
            if len(self._marks) > MAX_MARKS:
                # Loading, in the first two, stays as it is.
                self._marks = self._marks[:2] + self._marks[3::2]
                self._interval_s *= 2
        if self._clock() - self._saved_s >= SAVE_INTERVAL_S:
            self.save()

    def work(self) -> EngineWork:
        """The record up to now."""
        return EngineWork(
            run_id=self._run.run_id,
            host=platform.node(),
            pid=os.getpid(),
            device=self._device,
            hardware=self._hardware,
            marks=(*self._marks, self._now()),
            by_position=tuple(self._by_position()[:MAX_POSITIONS]),
        )

    def save(self) -> None:
        """Write the record. Nothing where the run's folder has gone, as after the swap of an overwriting run."""
        with self._save_lock:
            self._saved_s = self._clock()
            try:
                if self._run.read_meta(FINGERPRINT_FILE) is not None:
                    self._run.write_meta(self._name, self.work().to_json())
            except DSparkBatchError as error:
                if not self._has_warned:
                    logger.warning("what this engine does is not recorded for the report: %s", error)
                self._has_warned = True

    def close(self) -> None:
        """Save for the last time. May be called twice."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self.save()

    def _watch(self) -> None:
        while not self._stopped.wait(FIRST_INTERVAL_S):
            self.look()

    def _mark(self) -> None:
        self._marked_s = self._clock()
        self._marks.append(self._now())

    def _now(self) -> Mark:
        return self._unix_s + self._clock(), self._counts()
