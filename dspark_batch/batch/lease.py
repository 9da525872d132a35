"""One run at a time on an output folder: a numbered lease with a heartbeat, and the check that fences a late loser.

Each holder has a file of its own, ``_dspark/lease/<epoch>.json``; the highest epoch holds the folder. A file is created
exclusively and rewritten only by its owner, so a holder that was taken over cannot come back by a late heartbeat. On a
local disk creation is atomic and commits exclude takeovers by a lock; on object stores two runs that start at the very
same moment are told apart by reading back after a pause.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from dspark_batch.batch.layout import LOCK, META, STAGING
from dspark_batch.batch.store import Store
from dspark_batch.errors import DSparkBatchError, LeaseLostError, OutputError
from dspark_batch.job.config import OnConflict

LEASES = f"{META}/lease"
HEARTBEAT_S = 5.0
MISSED_BEATS = 6
"""A holder whose heartbeat stands still for this many periods is dead."""
SETTLE_S = 1.0
"""Pause before reading back on stores without exclusive creation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a folder. ``process`` pins the process on its host, so that a reused pid is not taken for it."""

    epoch: int
    run_id: str
    host: str
    pid: int
    process: str
    num_beats: int
    is_released: bool = False

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host})"


class Lease:
    """The right to commit to a folder, kept alive by a thread until ``release``. Use ``acquire_lease``."""

    def __init__(self, store: Store, holder: Holder, *, heartbeat_s: float = HEARTBEAT_S, had_others: bool) -> None:
        self._store = store
        self._holder = holder
        self._heartbeat_s = heartbeat_s
        self._ended = threading.Event()
        self.had_others = had_others
        """Whether another run held the folder just before; what was read of it earlier may be out of date."""
        self._thread = threading.Thread(target=self._beat, name="dspark-batch-lease", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        return self._holder.epoch

    def release(self) -> None:
        """Give the folder up. May be called twice; a lease that was taken over is left as it is."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._write(self._next(is_released=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            try:
                self._write(self._next())
            except DSparkBatchError:
                continue

    def _next(self, *, is_released: bool = False) -> Holder:
        values = {**asdict(self._holder), "num_beats": self._holder.num_beats + 1, "is_released": is_released}
        self._holder = Holder(**values)
        return self._holder

    def _write(self, holder: Holder) -> None:
        self._store.write(_name(holder.epoch), _encoded(holder), staging=_staging(holder))


def acquire_lease(
    store: Store,
    *,
    run_id: str,
    on_conflict: OnConflict,
    expected_epoch: int | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    say: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Hold the folder. A holder that has ended or is dead is replaced at once or once its heartbeat stood still.

    Args:
        on_conflict: what to do about a live holder. fail: raise as soon as a heartbeat shows that it lives. wait: until
            it ends. take_over: replace it; its next commit fails.
        expected_epoch: the epoch when the caller last looked at the folder; ``had_others`` says whether it changed.
        say: told once when there is something to wait for.

    Raises LeaseLostError for a live holder and ``fail``, OutputError where the folder cannot be made or written.
    """
    store.make_root()
    beats: tuple[int, int] | None = None
    still_s = 0.0
    while True:
        holder = current_holder(store)
        if holder is None or holder.is_released or on_conflict == "take_over" or _is_dead(holder):
            taken = _take(store, holder, run_id=run_id, sleep=sleep)
            if taken is not None:
                before = 0 if holder is None else holder.epoch
                others = (expected_epoch if expected_epoch is not None else before) != before
                return Lease(store, taken, heartbeat_s=heartbeat_s, had_others=others or beats is not None)
            continue
        now = (holder.epoch, holder.num_beats)
        if beats is None:
            say(
                f"{holder} holds the output; waiting to see whether it lives (up to {heartbeat_s * MISSED_BEATS:.0f} s)"
            )
        elif now != beats:
            still_s = 0.0
            if on_conflict == "fail":
                raise LeaseLostError(
                    f"{store.root}: {holder} is at work on this output; wait for it, stop it, "
                    "or set output.on_conflict to wait or take_over"
                )
        elif still_s >= heartbeat_s * MISSED_BEATS:
            on_conflict = "take_over"
            continue
        beats = now
        sleep(heartbeat_s / 2)
        still_s += heartbeat_s / 2


def current_holder(store: Store) -> Holder | None:
    """Who holds the folder or held it last. Raises OutputError where its lease cannot be read."""
    epoch = current_epoch(store)
    data = store.read(_name(epoch)) if epoch else None
    if data is None:
        return None
    try:
        values: dict[str, Any] = json.loads(data)
        return Holder(**values)
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{store.root}/{_name(epoch)} is not a lease: {error}; delete it if no run is alive"
        ) from error


def current_epoch(store: Store) -> int:
    """The highest epoch; 0 where no run ever held the folder."""
    names = [name.rpartition("/")[2].removesuffix(".json") for name in store.files(LEASES)]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_epoch(store: Store, epoch: int | None) -> None:
    """Raise LeaseLostError where the folder was taken over since ``epoch``. None: a run without a lease."""
    if epoch is None:
        return
    now = current_epoch(store)
    if now != epoch:
        raise LeaseLostError(
            f"{store.root}: another run took this output over (lease {now}, ours was {epoch}); this run commits no more"
        )


def _take(store: Store, before: Holder | None, *, run_id: str, sleep: Callable[[float], None]) -> Holder | None:
    """The new holder, or None where another run was faster."""
    epoch = 1 if before is None else before.epoch + 1
    holder = Holder(
        epoch=epoch,
        run_id=run_id,
        host=platform.node(),
        pid=os.getpid(),
        process=_process_mark(os.getpid()),
        num_beats=0,
    )
    with store.lock(LOCK, shared=False):
        if not store.create(_name(epoch), _encoded(holder), staging=_staging(holder)):
            return None
    if not store.is_local:
        sleep(SETTLE_S)
        standing = current_holder(store)
        if standing is None or standing.run_id != run_id:
            return None
    for name in store.files(LEASES):
        if name < _name(epoch):
            store.delete(name)
    return holder


def _is_dead(holder: Holder) -> bool:
    """Whether the holder is a process of this host that has ended."""
    return holder.host == platform.node() and _process_mark(holder.pid) != holder.process


def _process_mark(pid: int) -> str:
    """Boot and start time of a process; the same text for as long as it lives, another one after."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{pid} is not running"
    return f"{boot} {pid} {fields[19]}" if fields[0] != "Z" else f"{pid} is not running"


def _name(epoch: int) -> str:
    return f"{LEASES}/{epoch:08d}.json"


def _staging(holder: Holder) -> str:
    return f"{STAGING}/lease-{holder.epoch}.{holder.run_id}.{uuid.uuid4().hex[:8]}.tmp"


def _encoded(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=1, sort_keys=True) + "\n").encode()
