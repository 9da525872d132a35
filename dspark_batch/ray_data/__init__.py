"""Ray Data: the backend of a job, and ``Generate`` for pipelines of other people. Names resolve lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.ray_data.transform import Generate

__all__ = ["Generate"]


def __getattr__(name: str) -> object:
    if name != "Generate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dspark_batch.ray_data.transform import Generate

    return Generate
