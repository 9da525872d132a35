from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.lease import MISSED_BEATS, Holder, Lease, acquire_lease, current_epoch, current_holder
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.store import Store
from dspark_batch.errors import LeaseLostError, OutputError
from dspark_batch.testing.results import stats_of

SLOW = 1000.0
"""A heartbeat that does not come during a test."""


def acquire(store: Store, run_id: str, **rest) -> Lease:
    return acquire_lease(store, run_id=run_id, **{"on_conflict": "fail", "heartbeat_s": SLOW, **rest})


def write_holder(store: Store, lease: Lease, **changes) -> None:
    holder = replace(current_holder(store), **changes)
    name = f"_dspark/lease/{lease.epoch:08d}.json"
    store.write(name, json.dumps(asdict(holder)).encode(), staging="_dspark/staging/x.tmp")


def test_a_released_folder_is_taken_at_once_with_the_next_epoch(tmp_path):
    store = Store(str(tmp_path))
    with acquire(store, "a") as first:
        assert (first.epoch, first.had_others) == (1, False)
    with acquire(store, "b", expected_epoch=1) as second:
        assert (second.epoch, second.had_others) == (2, False)
        assert len(store.files("_dspark/lease")) == 1
    with acquire(store, "c", expected_epoch=1) as third:
        assert third.had_others


def test_a_live_holder_makes_the_second_run_fail_as_soon_as_its_heart_beats(tmp_path):
    store = Store(str(tmp_path))
    told: list[str] = []
    with acquire(store, "first", heartbeat_s=0.05):

        def sleep(_: float) -> None:
            time.sleep(0.15)

        with pytest.raises(LeaseLostError, match=r"run first .* is at work on this output"):
            acquire(store, "second", heartbeat_s=0.05, say=told.append, sleep=sleep)
        assert current_epoch(store) == 1
    assert "run first" in told[0]


def test_waiting_goes_on_until_the_holder_has_ended(tmp_path):
    store = Store(str(tmp_path))
    first = acquire(store, "first")
    calls = []

    def sleep(_: float) -> None:
        calls.append(None)
        write_holder(store, first, num_beats=len(calls), is_released=len(calls) == 9)

    with acquire(store, "second", on_conflict="wait", sleep=sleep) as second:
        assert (second.epoch, second.had_others, len(calls)) == (2, True, 9)
    first.release()


@pytest.mark.parametrize("on_conflict", ["fail", "wait"])
def test_a_heartbeat_that_stands_still_is_taken_over(tmp_path, on_conflict):
    store = Store(str(tmp_path))
    first = acquire(store, "first")
    waited = []
    with acquire(store, "second", on_conflict=on_conflict, sleep=waited.append) as second:
        assert second.epoch == 2
    assert MISSED_BEATS * SLOW <= sum(waited) <= (MISSED_BEATS + 1) * SLOW
    first.release()
    assert current_holder(store).run_id == "second"


def test_a_holder_whose_process_has_ended_on_this_host_is_replaced_at_once(tmp_path):
    code = (
        "import sys, os; from dspark_batch.batch.store import Store\n"
        "from dspark_batch.batch.lease import acquire_lease\n"
        "acquire_lease(Store(sys.argv[1]), run_id='gone', on_conflict='fail'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=120)
    store = Store(str(tmp_path))
    assert current_holder(store).run_id == "gone"
    with acquire(store, "next", sleep=lambda _: pytest.fail("waited for a dead process")) as lease:
        assert lease.epoch == 2


def test_a_run_that_was_taken_over_commits_nothing_more(tmp_path):
    def shard(index: int) -> ShardResult:
        return ShardResult(key=f"part-{index:05d}-0000abcd", table=pa.table({"x": [index]}), stats=stats_of(1))

    loser = RunStore(str(tmp_path))
    loser.open({"a": 1})
    with acquire(loser.store, "loser") as old:
        loser.hold(old)
        entry = loser.commit(shard(0))
        assert entry.epoch == 1
        winner = RunStore(str(tmp_path))
        winner.open({"a": 1})
        with acquire(winner.store, "winner", on_conflict="take_over") as new:
            winner.hold(new)
            with pytest.raises(LeaseLostError, match=r"lease 2, ours was 1"):
                loser.commit(shard(1))
            winner.commit(shard(1))
            assert set(winner.committed()) == {shard(0).key, shard(1).key}
            assert winner.committed()[shard(1).key].epoch == 2
    winner.check_integrity()


def test_only_one_of_two_that_take_the_same_epoch_gets_it(tmp_path):
    class Overtaken(Store):
        """Another run takes the epoch just before ours is written."""

        is_first = True

        def create(self, name: str, data: bytes, *, staging: str) -> bool:
            if self.is_first:
                self.is_first = False
                other = Holder(epoch=1, run_id="other", host="h", pid=1, process="p", num_beats=3, is_released=True)
                super().create(name, json.dumps(asdict(other)).encode(), staging="_dspark/staging/other.tmp")
            return super().create(name, data, staging=staging)

    with acquire(Overtaken(str(tmp_path)), "ours", expected_epoch=0) as lease:
        assert (lease.epoch, lease.had_others) == (2, True)


def test_a_lease_that_cannot_be_read_is_named(tmp_path):
    store = Store(str(tmp_path))
    store.write("_dspark/lease/00000004.json", b"{", staging="_dspark/staging/x.tmp")
    with pytest.raises(OutputError, match=r"00000004\.json is not a lease"):
        acquire(store, "a")
