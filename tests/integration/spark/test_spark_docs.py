"""The notebook of ``docs/spark.md`` runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dspark_batch.testing.jobs import SCRIPTED

pytestmark = pytest.mark.spark

ROOT = Path(__file__).parents[3]


def test_the_notebook_runs(spark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSPARK_BATCH_ENGINE_FACTORY", SCRIPTED)
    monkeypatch.chdir(ROOT)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "spark.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(cells) == 5
    names: dict[str, object] = {}
    try:
        for cell in cells:
            exec(compile(cell, "docs/spark.md", "exec"), names)
        answers = spark.table("answers")
        assert answers.count() == 96
        assert answers.filter("answer IS NULL OR error IS NOT NULL").count() == 0
    finally:
        spark.sql("DROP TABLE IF EXISTS answers")
    assert capsys.readouterr().out.count("+---") >= 4
