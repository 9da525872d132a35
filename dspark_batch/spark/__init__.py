"""The Spark connector: a column on a DataFrame, a SQL function, a whole table through the cluster.

Names resolve lazily, so that settings can be read where PySpark is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.spark.functions import generate_udf, register
    from dspark_batch.spark.table import run_table
    from dspark_batch.spark.table_function import register_table_function
    from dspark_batch.spark.transform import generate

_HOMES = {
    "generate": "dspark_batch.spark.transform",
    "generate_udf": "dspark_batch.spark.functions",
    "register": "dspark_batch.spark.functions",
    "register_table_function": "dspark_batch.spark.table_function",
    "run_table": "dspark_batch.spark.table",
}

__all__ = ["generate", "generate_udf", "register", "register_table_function", "run_table"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
