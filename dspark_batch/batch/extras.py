"""Packages that only some formats need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dspark_batch.errors import DSparkBatchError


def require(module: str, *, extra: str, needed_for: str, error: type[DSparkBatchError]) -> Any:
    """The module. Raises ``error`` with the way to install it where it is missing."""
    try:
        return import_module(module)
    except ImportError as missing:
        raise error(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which is not installed; "
            f"run: pip install 'dspark-batch[{extra}]'"
        ) from missing
