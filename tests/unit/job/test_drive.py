"""Driving a backend: totals, early stops, grace time. The backend is a script, the clock a counter."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_batch.batch.live import LiveCounts
from dspark_batch.batch.results import ShardStats
from dspark_batch.errors import EngineError
from dspark_batch.job.drive import Bounds, Ending, drive
from dspark_batch.job.local import LocalBackend
from dspark_batch.job.outcome import Totals
from dspark_batch.job.progress import LineReport, Work
from dspark_batch.job.signals import StoppedEarlyError, StopRequest, made_unless_stopped

NO_BOUNDS = Bounds(max_failed_rows=1e9, max_generated_tokens=None, max_run_s=None)


def stats(*, num_rows: int = 10, num_failed: int = 0, num_tokens: int = 100) -> ShardStats:
    return ShardStats(
        num_rows=num_rows,
        num_output_rows=num_rows,
        num_failed_rows=num_failed,
        num_retryable_rows=0,
        num_copied_rows=0,
        num_prompt_tokens=5,
        num_generated_tokens=num_tokens,
        num_rounds=50,
        num_drafted_tokens=0,
        num_accepted_tokens=0,
        num_failed_by_code={"null_prompt": num_failed} if num_failed else {},
    )


class ScriptedBackend:
    """Commits one shard per step until stopped; then the ``num_running`` shards that were running."""

    def __init__(
        self, *, entry: ShardStats, num_running: int = 1, on_step: Callable[[int], None] | None = None
    ) -> None:
        self._entry = SimpleNamespace(stats=entry, work=entry, shard="shard")
        self._num_running = num_running
        self._on_step = on_step or (lambda step: None)
        self.is_stopped = False
        self.has_begun = True

    def run(self, shards: Sequence[Any]) -> Iterator[Any]:
        left = len(shards)
        step = 0
        while left:
            self._on_step(step)
            step += 1
            yield None
            yield self._entry
            left -= 1
            if self.is_stopped:
                left = min(left, self._num_running)
                self._num_running -= 1

    def live(self) -> LiveCounts:
        return LiveCounts()

    def is_at_work(self) -> bool:
        return self.has_begun

    def warnings(self) -> Sequence[str]:
        return ("kernels are off",)

    def stop(self) -> bool:
        self.is_stopped = True
        return self.has_begun


def run(backend: Any, num_shards: int, **options: Any) -> tuple[Ending, Totals, str]:
    stream = io.StringIO()
    done = options.pop("done", Totals())
    options.setdefault("whole", Totals())
    options.setdefault("bounds", NO_BOUNDS)
    options.setdefault("stop", StopRequest())
    with LineReport(
        Work(num_rows=10 * num_shards, num_shards=num_shards, max_tokens_per_row=9), stream=stream
    ) as report:
        ending = drive(backend, range(num_shards), done=done, report=report, **options)  # type: ignore[arg-type]
    return ending, done, stream.getvalue()


def backend_with_signal(num_running: int, *, on_step: Callable[[int], None] | None = None) -> tuple[Any, StopRequest]:
    """A backend that gets SIGTERM while its first shard runs."""
    stop = StopRequest()

    def step(number: int) -> None:
        if number == 0:
            stop._receive(15, None)
        if on_step is not None:
            on_step(number)

    return ScriptedBackend(entry=stats(), num_running=num_running, on_step=step), stop


def test_all_shards_are_counted() -> None:
    ending, done, _ = run(ScriptedBackend(entry=stats(num_failed=1)), 7)
    assert ending is Ending.DONE
    assert (done.num_shards, done.num_rows, done.num_failed_rows) == (7, 70, 7)
    assert done.failures == {"null_prompt": 7}
    assert done.accepted_length == 2.0


def test_what_engines_warn_of_is_told_once() -> None:
    assert run(ScriptedBackend(entry=stats()), 7)[2].count("warning: kernels are off\n") == 1


def test_a_signal_lets_running_shards_commit_and_begins_no_other() -> None:
    backend, stop = backend_with_signal(2)
    ending, done, text = run(backend, 50, stop=stop)
    assert ending is Ending.SIGNAL
    assert done.num_shards == 3
    assert "SIGTERM: beginning no more shards" in text


def test_a_signal_during_the_last_shards_still_ends_as_done() -> None:
    backend, stop = backend_with_signal(5)
    assert run(backend, 3, stop=stop)[0] is Ending.DONE


def test_a_signal_before_the_first_shard_begins_none() -> None:
    stop = StopRequest()
    stop._receive(2, None)
    ending, done, _ = run(ScriptedBackend(entry=stats()), 3, stop=stop)
    assert ending is Ending.SIGNAL
    assert done.num_shards == 0


def test_shards_that_outlast_the_grace_time_are_given_up() -> None:
    now_s = 0.0

    def pass_time(step: int) -> None:
        nonlocal now_s
        now_s += 30.0

    backend, stop = backend_with_signal(50, on_step=pass_time)
    ending, done, _ = run(backend, 50, stop=stop, grace_s=60.0, clock=lambda: now_s)
    assert ending is Ending.GRACE_OVER
    assert done.num_shards == 3


def test_the_token_budget_counts_earlier_processes_and_stops() -> None:
    bounds = replace(NO_BOUNDS, max_generated_tokens=500)
    ending, done, _ = run(
        ScriptedBackend(entry=stats(num_tokens=100), num_running=0),
        50,
        whole=Totals(num_generated_tokens=250),
        bounds=bounds,
    )
    assert ending is Ending.TOKEN_BUDGET
    assert done.num_shards == 3


class Clock:
    """Moves by ``step_s`` whenever a scripted shard begins."""

    def __init__(self, *, step_s: float) -> None:
        self._step_s = step_s
        self.now_s = 1000.0

    def tick(self, step: int) -> None:
        self.now_s += self._step_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("num_shards", "ending", "num_done"), [(50, Ending.TIME_BUDGET, 5), (5, Ending.DONE, 5)])
def test_once_its_time_is_over_the_run_begins_no_shard_and_those_in_flight_commit(
    num_shards: int, ending: Ending, num_done: int
) -> None:
    clock = Clock(step_s=30.0)
    backend = ScriptedBackend(entry=stats(), num_running=3, on_step=clock.tick)
    found, done, _ = run(backend, num_shards, bounds=replace(NO_BOUNDS, max_run_s=60.0), clock=clock)
    assert (found, done.num_shards) == (ending, num_done)


def test_a_run_whose_time_is_over_before_any_shard_began_ends_at_once() -> None:
    clock = Clock(step_s=30.0)
    backend = ScriptedBackend(entry=stats(), on_step=clock.tick)
    backend.has_begun = False
    ending, done, _ = run(backend, 50, bounds=replace(NO_BOUNDS, max_run_s=30.0), clock=clock)
    assert (ending, done.num_shards) == (Ending.TIME_BUDGET, 0)


def test_too_many_failed_rows_stop_the_run_early() -> None:
    bounds = replace(NO_BOUNDS, max_failed_rows=4)
    ending, done, _ = run(ScriptedBackend(entry=stats(num_failed=3), num_running=0), 50, bounds=bounds)
    assert ending is Ending.TOO_MANY_FAILED
    assert done.num_failed_rows == 6


def test_a_second_signal_ends_at_once() -> None:
    stop = StopRequest()
    stop._receive(15, None)
    with pytest.raises(KeyboardInterrupt):
        stop._receive(2, None)


def test_handlers_are_put_back() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_that_a_library_replaced_are_taken_back_until_the_end() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop.take_signals()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_asked()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_local_backend_runs_every_shard_once_with_bounded_overlap() -> None:
    running = set()
    most = 0
    lock = threading.Lock()

    def run_shard(shard: Any) -> Any:
        nonlocal most
        with lock:
            running.add(shard)
            most = max(most, len(running))
        threading.Event().wait(0.001)
        with lock:
            running.remove(shard)
        return shard

    backend = LocalBackend(run_shard, live=LiveCounts, shards_in_flight=3)
    assert sorted(x for x in backend.run(range(23)) if x is not None) == list(range(23))  # type: ignore[arg-type]
    assert most <= 3


def test_the_local_backend_stops_between_shards() -> None:
    backend = LocalBackend(lambda shard: shard, live=LiveCounts, shards_in_flight=1)  # type: ignore[arg-type, return-value]
    entries = backend.run(range(1, 10_000))  # type: ignore[arg-type]
    first = next(entry for entry in entries if entry is not None)
    backend.stop()
    rest = [entry for entry in entries if entry is not None]
    assert first == 1
    assert len(rest) < 9_998 or rest[-1] == 9_999


def test_the_local_backend_raises_what_a_shard_raised() -> None:
    def run_shard(shard: Any) -> Any:
        if shard == 3:
            raise EngineError("broken")
        return shard

    with pytest.raises(EngineError, match="broken"):
        list(LocalBackend(run_shard, live=LiveCounts, shards_in_flight=2).run(range(1, 9)))  # type: ignore[arg-type]


def test_a_signal_before_any_shard_began_ends_at_once() -> None:
    backend, stop = backend_with_signal(50)
    backend.has_begun = False
    ending, done, text = run(backend, 50, stop=stop)
    assert ending is Ending.SIGNAL
    assert done.num_shards <= 1
    assert "SIGTERM: no shard has begun, ending now" in text
    assert "rows 0/" not in text, "progress begins with the first shard"


class Loaded:
    """What a load gives, and whether it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


def test_a_load_that_a_signal_interrupts_is_left_and_closed_when_it_ends() -> None:
    stop, goes_on, loaded = StopRequest(), threading.Event(), Loaded()

    def load() -> Loaded:
        stop._receive(2, None)
        goes_on.wait(10)
        return loaded

    with pytest.raises(StoppedEarlyError):
        made_unless_stopped(load, stop=stop)
    assert not loaded.closed.is_set()
    goes_on.set()
    assert loaded.closed.wait(10)


def test_a_load_gives_what_it_made_or_raises_what_it_raised() -> None:
    def fail() -> Loaded:
        raise EngineError("no room")

    loaded = Loaded()
    assert made_unless_stopped(lambda: loaded, stop=StopRequest()) is loaded
    with pytest.raises(EngineError, match="no room"):
        made_unless_stopped(fail, stop=StopRequest())
