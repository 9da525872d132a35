"""A shard that has the engine to itself, and engines in this process that are made anew."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.isolation import EngineGate
from dspark_batch.batch.restart import RestartingExecutor
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.job.local import LocalBackend
from dspark_batch.testing.scripted_engine import ScriptedEngine

made: list[weakref.ref[ScriptedEngine]] = []


def breaking_once(config: EngineConfig) -> ScriptedEngine:
    """Breaks after three rows, the first time; refuses to be beside another engine."""
    assert all(engine() is None for engine in made), "the engine before is still in memory"
    engine = ScriptedEngine(fault_after_rows=None if made else 3)
    made.append(weakref.ref(engine))
    return engine


def test_the_engine_that_broke_is_out_of_memory_before_the_next_is_made(open_run: Any) -> None:
    made.clear()
    plan, spec = open_run(f"{__name__}:breaking_once")
    with RestartingExecutor(spec) as executor:
        backend = LocalBackend(executor.run, live=executor.live, shards_in_flight=3, restart=executor.restart)
        entries = [entry for entry in backend.run(plan.shards) if entry is not None]
        assert backend.live().num_samples >= 40
    assert len(made) == 2
    assert sorted(entry.shard for entry in entries) == sorted(shard.name for shard in plan.shards)
    assert read_output(spec.config.output.path)["error"].null_count == 40


def test_after_a_stop_a_broken_engine_is_not_replaced() -> None:
    def run_shard(shard: Any) -> Any:
        backend.stop()
        raise EngineError("broken")

    def restart(fault: EngineError) -> None:
        pytest.fail("replaced")

    backend = LocalBackend(run_shard, live=lambda: None, shards_in_flight=1, restart=restart)  # type: ignore[arg-type, return-value]
    with pytest.raises(EngineError, match="broken"):
        list(backend.run(range(3)))  # type: ignore[arg-type]


def test_who_is_alone_has_nobody_beside_it_and_gets_its_turn() -> None:
    gate = EngineGate()
    inside: list[str] = []
    seen: list[tuple[str, ...]] = []
    lock = threading.Lock()

    def pass_through(name: str) -> None:
        for _ in range(50):
            with gate.alone() if name == "alone" else gate.shared():
                with lock:
                    inside.append(name)
                    seen.append(tuple(inside))
                threading.Event().wait(0.0005)
                with lock:
                    inside.remove(name)

    threads = [threading.Thread(target=pass_through, args=(name,)) for name in ("a", "b", "alone", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 4 * 50
    assert all(names == ("alone",) for names in seen if "alone" in names)
    assert any(len(names) > 1 for names in seen)
