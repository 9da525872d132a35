from __future__ import annotations

import gc

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.executor import ShardExecutor
from dspark_batch.testing.instant_engine import FACTORY


def test_what_a_worker_loaded_is_out_of_the_collectors_way_until_the_worker_closes(open_run):
    plan, spec = open_run(FACTORY)
    with ShardExecutor(spec) as executor:
        assert gc.get_freeze_count() > 1000
        for shard in plan.shards:
            executor.run(shard)
    assert gc.get_freeze_count() == 0
    assert read_output(spec.config.output.path)["summary"].to_pylist() == ["a short answer"] * 40
