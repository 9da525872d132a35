from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_batch.job.config import JobConfig

MakeConfig = Callable[..., JobConfig]


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
            values[name] = {**values.get(name, {}), **section} if name != "prompt" else section
        return JobConfig.model_validate(values)

    return make
