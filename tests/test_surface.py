"""The public surface: names that users import, console commands, shipped configs."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import dspark_batch
from dspark_batch.job.config import EngineSection, LimitsSection, SpeculationSection
from dspark_batch.job.loader import load_config

ROOT = Path(__file__).parents[1]
SECTIONS = {"engine": EngineSection, "speculation": SpeculationSection, "limits": LimitsSection}
CONFIG_KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(?!json\b)([a-z_]+)\b(?![.(])")
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if not file.name.startswith("train_"))


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in dspark_batch.__all__:
        value = getattr(dspark_batch, name)
        assert name == "__version__" or (callable(value) and value.__doc__), name


def test_public_names_are_listed_and_others_are_refused() -> None:
    assert dir(dspark_batch) == sorted(dspark_batch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = dspark_batch.Engine


def test_the_ray_transform_is_public() -> None:
    import dspark_batch.ray_data

    assert dspark_batch.ray_data.__all__ == ["Generate"]
    assert dspark_batch.ray_data.Generate.__doc__
    with pytest.raises(AttributeError):
        _ = dspark_batch.ray_data.Nothing


def test_the_console_command_points_at_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["dspark-batch"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert project["version"] == dspark_batch.__version__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_its_local_input_is_there(path: Path) -> None:
    config = load_config(path)
    inputs = [config.input.path] if isinstance(config.input.path, str) else config.input.path
    for entry in inputs:
        if "://" not in entry and entry.startswith("configs/"):
            assert list(ROOT.glob(entry)), entry


def test_keys_that_messages_name_are_keys_of_the_config() -> None:
    unknown = {}
    for path in (ROOT / "dspark_batch").rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        named = {found for text in texts if isinstance(text, str) for found in CONFIG_KEY.findall(text)}
        unknown[path.name] = sorted(key for section, key in named if key not in SECTIONS[section].model_fields)
    assert {name: keys for name, keys in unknown.items() if keys} == {}


def test_there_is_a_quickstart() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS
