from __future__ import annotations

from pathlib import Path

import pytest

from dspark_batch.errors import ConfigError
from dspark_batch.job.tables import TableRun, run_spark_table


def test_an_unknown_backend_is_refused_before_spark_starts() -> None:
    run = TableRun(config=Path("x.yaml"), source="a", target="b", staging="c", backend="local")
    with pytest.raises(ConfigError, match="--backend: must be ray or spark, got 'local'"):
        run_spark_table(run)
