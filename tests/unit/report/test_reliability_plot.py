"""The reliability plot is a file of the kind asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_batch.errors import ConfigError
from dspark_batch.report.reliability import save_reliability_plot

pytest.importorskip("matplotlib")

BINS = {"history": [[(0.2, 0.25, 10), (0.7, 0.6, 30)], [(0.4, 0.4, 5)]], "margin": [[(0.9, 0.88, 40)]]}


def test_it_is_written_and_names_every_estimator(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    save_reliability_plot(BINS, path)
    text = path.read_text()
    assert "history" in text
    assert "margin" in text


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end in"):
        save_reliability_plot(BINS, tmp_path / "plot.txt")
