from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.executor import WorkerSpec
from dspark_batch.batch.shards import Plan, make_plan
from dspark_batch.job.config import JobConfig

MakeConfig = Callable[..., JobConfig]
OpenRun = Callable[[str], tuple[Plan, WorkerSpec]]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """A config by sections; input and output lie in the test's folder."""

    def make(**sections: Any) -> JobConfig:
        values: dict[str, Any] = {
            "input": {"path": str(tmp_path / "in")},
            "prompt": {"template": "Summarise: {{ text }}"},
            "output": {"path": str(tmp_path / "out"), "column": "summary"},
        }
        for name, section in sections.items():
            is_whole = name == "prompt" or not isinstance(section, dict)
            values[name] = section if is_whole else {**values.get(name, {}), **section}
        return JobConfig.model_validate(values)

    return make


@pytest.fixture
def open_run(make_config: MakeConfig, tmp_path: Path) -> OpenRun:
    """Opens a run over 40 rows in 4 shards, for workers with the engine of a factory."""

    def opened(engine_factory: str) -> tuple[Plan, WorkerSpec]:
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"text": [f"t{n}" for n in range(40)]}), tmp_path / "in" / "a.parquet")
        config = make_config(shards={"rows": 10})
        plan = make_plan(config.input, max_rows=10)
        run = RunStore(config.output.path)
        run.open({"a": 1})
        spec = WorkerSpec(
            config=config,
            plan_schema=plan.schema,
            fingerprint=run.ticket.fingerprint,
            run_id=run.run_id,
            engine_factory=engine_factory,
            ticket=run.ticket,
        )
        return plan, spec

    return opened
