"""Reads a training config: YAML or JSON plus ``key=value`` overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.training.config import TrainConfig


def load_train_config(path: str | Path, *, overrides: Sequence[str] = ()) -> TrainConfig:
    """The validated config; values of overrides are read as YAML where PyYAML is installed, else as JSON.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or out of range; it lists every problem.
    """
    source = str(path)
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"), is_json=Path(path).suffix == ".json")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError([Problem("config", f"cannot be read: {error}", source)]) from None
    if not isinstance(values, dict):
        raise ConfigError([Problem("config", f"must be a mapping of sections, got {values!r}", source)])
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problem = Problem(override, "is not of the form key=value, such as optimize.seed=1", "command line")
            raise ConfigError([problem])
        _set(values, key.split("."), _value(text))
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(".".join(map(str, e["loc"])) or "config", f"{e['msg']}, got {e['input']!r}", source)
                for e in error.errors()
            ]
        ) from None


def _parse(text: str, *, is_json: bool) -> Any:
    if is_json:
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _set(values: dict[str, Any], keys: Sequence[str], value: object) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        if not isinstance(below, dict):
            below = values[key] = {}
        values = below
    values[keys[-1]] = value
