from __future__ import annotations

import gc

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
from dspark_batch.batch.shards import make_plan
from dspark_batch.testing.instant_engine import FACTORY


def test_what_a_worker_loaded_is_out_of_the_collectors_way_until_the_worker_closes(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": [f"t{row}" for row in range(40)]}), tmp_path / "in" / "a.parquet")
    config = make_config(shards={"rows": 10})
    plan = make_plan(config.input, max_rows=10)
    run = RunStore(config.output.path)
    run.open({"a": 1})
    spec = WorkerSpec(
        config=config,
        plan_schema=plan.schema,
        fingerprint=run.ticket.fingerprint,
        run_id=run.run_id,
        engine_factory=FACTORY,
        ticket=run.ticket,
    )
    with ShardExecutor(spec) as executor:
        assert gc.get_freeze_count() > 1000
        for shard in plan.shards:
            executor.run(shard)
    assert gc.get_freeze_count() == 0
    assert read_output(config.output.path)["summary"].to_pylist() == ["a short answer"] * 40
