"""Reads a job config: YAML plus ``key=value`` overrides, with every problem reported at once."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig

COMMAND_LINE = "command line"
"""Source named in problems with an override."""

_DOTTED = re.compile(r"^([a-z_]+(?:\.[a-z_]+)+)\b")
_HAS_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


def load_config(config: ConfigLike, *, overrides: Sequence[str] = ()) -> JobConfig:
    """The validated config of a YAML file or its like, with ``overrides`` such as ``"sampling.seed=1"`` laid over it.

    Values of overrides are read as YAML (``null``, ``0.5``, ``[a, b]``). Paths stay as written; see ``absolute_paths``.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, repeats a key, or a field is unknown or out of range.
            It lists every problem with its field, its value, and the file (or "command line") it came from.
    """
    return _validated(_tree(config), source=source_of(config), overrides=overrides)


def read_values(config: ConfigLike) -> dict[str, Any]:
    """The sections of a config, not validated yet. Raises ConfigError where a file is no mapping of sections."""
    tree = _tree(config)
    if tree.problems:
        raise ConfigError(tree.problems)
    return tree.values


def source_of(config: ConfigLike) -> str:
    """What problems call a config: its file, else ``config``."""
    return str(config) if isinstance(config, str | Path) else "config"


def config_from_values(values: Mapping[str, Any], *, source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """``load_config`` for sections that are at hand as nested mappings; ``source`` names them in problems."""
    return _validated(_tree(values), source=source, overrides=overrides)


def _validated(tree: _Tree, *, source: str, overrides: Sequence[str]) -> JobConfig:
    problems, overridden = _apply_overrides(tree.values, overrides)
    problems = tree.problems + problems
    try:
        config = JobConfig.model_validate(_without_empty_sections(tree.values))
    except ValidationError as error:
        found = _problems(error.errors(), source=source, overridden=set(overridden))
        problems += [_with_quoting_hint(problem, overridden) for problem in found]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def absolute_paths(config: JobConfig, *, base: Path | None = None) -> JobConfig:
    """The config with local paths made absolute against ``base`` (the current directory by default).

    Workers on other machines or in other directories then mean the same files. URIs stay; so do a target and a drafter
    that do not exist as a local path (they are names).
    """
    root = Path.cwd() if base is None else base
    paths = config.input.path if config.input.format != "iceberg" else []
    inputs: str | list[str] = _absolute(paths, root) if isinstance(paths, str) else [_absolute(p, root) for p in paths]
    drafter = config.speculation.path
    return config.model_copy(
        update={
            "input": config.input.model_copy(update={"path": inputs} if inputs else {}),
            "output": config.output.model_copy(update={"path": _absolute(config.output.path, root)}),
            "model": config.model.model_copy(update={"target": _absolute_if_there(config.model.target, root)}),
            "speculation": config.speculation.model_copy(
                update={"path": None if drafter is None else _absolute_if_there(drafter, root)}
            ),
        }
    )


def dump_config(config: JobConfig) -> str:
    """The config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(slots=True)
class _Tree:
    values: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)


def _tree(config: ConfigLike) -> _Tree:
    if isinstance(config, str | Path):
        return _read_yaml(Path(config))
    values = config.model_dump(mode="json") if isinstance(config, JobConfig) else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            [Problem("config", f"must be a YAML file, a mapping of sections or a JobConfig, got {values!r}")]
        )
    return _Tree(copy.deepcopy(dict(values)))


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that collects repeated keys, which plain YAML lets through with the last one winning."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                self.repeated.append((key, key_node.start_mark.line + 1))
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> _Tree:
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("config", f"cannot be read: {error}", source)]) from None
    loader = _UniqueKeyLoader(text)
    try:
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError([Problem("config", f"is not valid YAML: {error}", source)]) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError([Problem("config", f"must be a mapping of sections, got {values!r}", source)])
    problems = [Problem(key, f"stands twice; the second time in line {line}", source) for key, line in loader.repeated]
    return _Tree(values, problems)


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> tuple[list[Problem], dict[str, str]]:
    """The problems, and what was laid over which key."""
    if isinstance(overrides, str):
        raise ConfigError(
            [Problem("overrides", f"must be a list of texts, such as [{overrides!r}], got {overrides!r}")]
        )
    problems: list[Problem] = []
    overridden: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(Problem(override, "is not of the form key=value, such as sampling.seed=1", COMMAND_LINE))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or error
            message = f"value {text!r} is not valid YAML ({reason}); {_quoted(key, text)}"
            problems.append(Problem(key, message, COMMAND_LINE))
            continue
        _set(values, key.split("."), value)
        overridden[key] = text
    return problems, overridden


def _with_quoting_hint(problem: Problem, overridden: Mapping[str, str]) -> Problem:
    """Adds, where YAML read something else into a text of the command line, how to write it."""
    if problem.source != COMMAND_LINE or "valid string" not in problem.message:
        return problem
    for key, text in overridden.items():
        is_below = problem.field.startswith(key + ".")
        if not is_below and problem.field != key:
            continue
        spelled = yaml.load(text, Loader=yaml.BaseLoader)
        is_list_of_texts = isinstance(spelled, list) and yaml.safe_load(text) != spelled
        if is_list_of_texts or not is_below:
            hint = _quoted(key, spelled if is_list_of_texts else text)
            return replace(problem, message=f"{problem.message}; {hint}")
    return problem


def _quoted(key: str, value: str | list[object]) -> str:
    """How to write texts so that the shell and YAML both leave them as they are."""
    return f"put text in quotes: {shlex.quote(f'{key}={json.dumps(value, ensure_ascii=False)}')}"


def _set(values: dict[str, Any], keys: Sequence[str], value: object) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        if not isinstance(below, dict):
            below = values[key] = {}
        values = below
    values[keys[-1]] = value


def _without_empty_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drops sections that stand in the file with nothing under them (YAML reads them as null)."""
    return {key: value for key, value in values.items() if value is not None}


def _problems(errors: Iterable[ErrorDetails], *, source: str, overridden: set[str]) -> list[Problem]:
    messages: dict[str, list[str]] = {}
    for error in errors:
        for where, message in _split(error):
            known = messages.setdefault(where, [])
            if message not in known:
                known.append(message)
    found = []
    for where, parts in messages.items():
        from_override = any(where == key or where.startswith(key + ".") for key in overridden)
        found.append(Problem(where, "; or ".join(parts), COMMAND_LINE if from_override else source))
    return found


def _split(error: ErrorDetails) -> list[tuple[str, str]]:
    """The (field, message) pairs of one pydantic error; a validator of ours may hold several, one a line."""
    where = _field_path(error["loc"])
    if error["type"] == "extra_forbidden":
        return [(where, "is not a known key" + _suggestion(error["loc"]))]
    if error["type"] == "missing":
        return [(where, "is required and missing")]
    if error["type"] == "value_error":
        lines = str(error.get("ctx", {}).get("error", error["msg"])).splitlines()
        return [_own_message(line, where) for line in lines]
    if error["type"] in ("dict_type", "model_type"):
        return [(where, f"must be a mapping, such as {{key: value}}, got {error['input']!r}")]
    return [(where, f"{_lower_first(error['msg'])}, got {error['input']!r}")]


def _own_message(line: str, where: str) -> tuple[str, str]:
    match = _DOTTED.match(line)
    return (match.group(1), line[match.end() :].strip()) if match else (where, line)


def _field_path(loc: tuple[int | str, ...]) -> str:
    """The dotted path of the fields in ``loc``; pydantic appends the members of a union, which are left out."""
    parts: list[str] = []
    model: type[BaseModel] | None = JobConfig
    for part in loc:
        if model is None:
            if isinstance(part, int):
                parts.append(str(part))
            continue
        parts.append(str(part))
        model = _model_below(model, str(part))
    return ".".join(parts)


def _suggestion(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = JobConfig
    for part in loc[:-1]:
        below = _model_below(model, str(part))
        if below is None:
            return ""
        model = below
    names = sorted(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys here: {', '.join(names)}"


def _model_below(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    known = model.model_fields.get(name)
    if known is None:
        return None
    for kind in (known.annotation, *get_args(known.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _absolute(path: str, root: Path) -> str:
    if _HAS_SCHEME.match(path):
        return path
    return os.path.normpath(root / Path(path).expanduser())


def _absolute_if_there(name: str, root: Path) -> str:
    path = root / Path(name).expanduser()
    return os.path.normpath(path) if path.exists() else name
