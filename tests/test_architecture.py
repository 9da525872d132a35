"""The layers of the package: who may import whom at module level, and how large modules and functions may grow."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dspark_batch"
MODULE_CAP_LINES = 400
MODULE_MEDIAN_LINES = 150
FUNCTION_CAP_LINES = 80
FUNCTION_P90_LINES = 40

VOCABULARY = {"core", "errors", "metrics", "provenance"}
BELOW_MODELS = VOCABULARY | {"tensors", "extents"}

ALLOWED_PACKAGES: dict[str, set[str]] = {
    "__init__": set(),
    "core": VOCABULARY,
    "errors": VOCABULARY,
    "metrics": VOCABULARY,
    "provenance": VOCABULARY,
    "tensors": VOCABULARY,
    "extents": VOCABULARY,
    "sampling": BELOW_MODELS,
    "verification": BELOW_MODELS,
    "scheduling": BELOW_MODELS,
    "models": BELOW_MODELS,
    "drafters": BELOW_MODELS | {"sampling", "models"},
    "engine": BELOW_MODELS | {"sampling", "verification", "scheduling", "models", "drafters"},
    "training": BELOW_MODELS | {"sampling", "verification", "scheduling", "models", "drafters"},
    "batch": VOCABULARY,
    "ray_data": VOCABULARY | {"batch"},
    "spark": VOCABULARY | {"batch"},
    "job": VOCABULARY,
    "report": VOCABULARY,
    "bench": VOCABULARY,
    "cli": VOCABULARY | {"job", "report", "bench"},
    "__main__": VOCABULARY | {"cli"},
    "jobs": VOCABULARY | {"job", "report", "bench", "cli"},
}
"""Packages of ours that a package may import, itself excepted. Every ``config.py`` may be imported by all."""

LIGHT = {"pydantic", "pydantic_core", "yaml"}
ALLOWED_LIBRARIES: dict[str, set[str]] = {
    "__init__": set(),
    "core": set(),
    "errors": set(),
    "metrics": set(),
    "provenance": set(),
    "tensors": {"torch"},
    "extents": set(),
    "sampling": {"torch", "numpy"},
    "verification": {"torch", "numpy"},
    "scheduling": {"torch", "numpy"},
    "models": {"torch", "numpy", "safetensors", "pydantic", "transformers", "tokenizers", "gguf", "jinja2"},
    "drafters": {"torch", "numpy", "safetensors", "pydantic"},
    "engine": {"torch", "numpy", "pydantic"},
    "training": {"torch", "numpy", "safetensors", "pydantic", "transformers"},
    "batch": {"pyarrow", "numpy", "jinja2"},
    "ray_data": {"ray", "pyarrow"},
    "spark": {"pyspark", "pyarrow", "pydantic"},
    "job": LIGHT | {"rich"},
    "report": {"jinja2"},
    "bench": {"typer", "rich"},
    "cli": {"typer"},
    "__main__": set(),
    "jobs": set(),
}
"""Libraries outside the standard one that a package may import at module level; the rest load inside functions."""

MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def _package_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        return parts[0]
    return "jobs"


def _module_level_imports(tree: ast.Module) -> list[str]:
    """Dotted names imported when the module loads; imports for type checkers are left out."""
    names: list[str] = []
    queue: list[ast.stmt] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If):
            queue += node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            queue += [*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)]
        elif isinstance(node, ast.ClassDef | ast.With):
            queue += node.body
    return names


def _violations(path: Path) -> list[str]:
    package = _package_of(path)
    if package == "testing":
        return []
    assert package in ALLOWED_PACKAGES, f"{path}: package {package!r} has no layer; add it to architecture and test"
    libraries = ALLOWED_LIBRARIES[package] | ({"pydantic"} if path.name == "config.py" else set())
    found = []
    for name in _module_level_imports(ast.parse(path.read_text(encoding="utf-8"))):
        top, *rest = name.split(".")
        if top == "dspark_batch":
            ours = rest[0] if rest else "__init__"
            is_config = len(rest) > 1 and "config" in rest[1:3]
            is_fine = ours in ALLOWED_PACKAGES[package] | {package, "__version__"} or is_config
        else:
            is_fine = top in sys.stdlib_module_names or top in libraries
        if not is_fine:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert _violations(path) == []


def test_ray_and_spark_and_engine_never_import_each_other() -> None:
    apart = [("ray_data", "spark"), ("spark", "ray_data"), ("engine", "training"), ("training", "engine")]
    assert not [pair for pair in apart if pair[1] in ALLOWED_PACKAGES[pair[0]]]


def test_no_module_is_longer_than_the_cap_and_the_median_is_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {str(path): n for path, n in lines.items() if n > MODULE_CAP_LINES} == {}
    assert statistics.median(n for n in lines.values() if n > 1) <= MODULE_MEDIAN_LINES


def test_no_function_is_longer_than_the_cap_and_nine_of_ten_are_short() -> None:
    lengths: dict[str, int] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = _length_lines(node)
    assert {name: n for name, n in lengths.items() if n > FUNCTION_CAP_LINES} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= FUNCTION_P90_LINES


def test_entry_points_of_ray_jobs_hold_no_logic() -> None:
    assert {p.name: n for p in (ROOT / "jobs").glob("*.py") if (n := len(p.read_text().splitlines())) > 40} == {}


def _length_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_import_scan_sees_conditional_imports_and_skips_type_checking() -> None:
    source = """
import os
if TYPE_CHECKING:
    import torch
else:
    import json
try:
    from ray import data
except ImportError:
    import csv
def f():
    import pyspark
"""
    assert sorted(_module_level_imports(ast.parse(source))) == ["csv", "json", "os", "ray.data"]
