"""``input.filter``: a small expression language over columns, parsed by Python's grammar and never evaluated by it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dspark_batch.errors import ConfigError, Problem

FIELD = "input.filter"
HELP = (
    "a filter compares columns with constants (==, !=, <, <=, >, >=, in, not in, is None, is not None) and joins "
    "comparisons with and, or, not; column('odd name') names a column that is not a Python name"
)

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], pc.Expression]] = {
    ast.Eq: lambda left, right: left == right,
    ast.NotEq: lambda left, right: left != right,
    ast.Lt: lambda left, right: left < right,
    ast.LtE: lambda left, right: left <= right,
    ast.Gt: lambda left, right: left > right,
    ast.GtE: lambda left, right: left >= right,
}


class _RefusedError(Exception):
    pass


def parse_filter(text: str, *, schema: pa.Schema) -> tuple[pc.Expression, tuple[str, ...]]:
    """The filter as a pyarrow expression, and the columns that it reads.

    Comparisons with NULL are neither true nor false, as in SQL: such rows are left out. A constant is cast to the
    column's type, so dates and timestamps are written as text (``day >= '2026-01-31'``).

    Raises:
        ConfigError: the text is not such an expression, a column is missing, or types do not fit.
    """
    parser = _Parser(schema)
    try:
        expression = parser.condition(ast.parse(text.strip(), mode="eval").body)
        schema.empty_table().filter(expression)
    except SyntaxError as error:
        raise _problem(text, f"{error.msg}; {HELP}") from error
    except _RefusedError as error:
        raise _problem(text, f"{error}; {HELP}") from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _problem(text, str(error)) from error
    return expression, tuple(sorted(parser.columns))


def split_filter(text: str, *, schema: pa.Schema) -> list[FilterPart]:
    """The conditions that a valid filter joins with ``and``: a row passes the filter if and only if it passes each."""
    node = ast.parse(text.strip(), mode="eval").body
    nodes = node.values if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And) else [node]
    parts = []
    for part in nodes:
        parser = _Parser(schema)
        expression = parser.condition(part)
        parts.append(FilterPart(expression=expression, columns=frozenset(parser.columns), negates=_negates(part)))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterPart:
    """One condition. ``negates``: it holds a ``not`` or ``!=``, so that values outside a range may pass it."""

    expression: pc.Expression
    columns: frozenset[str]
    negates: bool

    def is_decided_by_statistics(self, stored: pa.Schema) -> bool:
        """Whether minimum, maximum and number of NULLs of the stored columns can show that no row passes.

        Statistics leave out NaN, which passes negated conditions only.
        """
        if not self.columns <= set(stored.names):
            return False
        return not (self.negates and any(pa.types.is_floating(stored.field(name).type) for name in self.columns))


def _negates(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Not | ast.NotEq | ast.NotIn) for part in ast.walk(node))


class _Parser:
    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self.columns: set[str] = set()

    def condition(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return self._joined(values, lambda left, right: left & right)
            case ast.BoolOp(values=values):
                return self._joined(values, lambda left, right: left | right)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare():
                return self._compare(node)
            case _:
                return self._column(node)[0]

    def _joined(self, values: list[ast.expr], join: Callable[[Any, Any], pc.Expression]) -> pc.Expression:
        joined = self.condition(values[0])
        for value in values[1:]:
            joined = join(joined, self.condition(value))
        return joined

    def _compare(self, node: ast.Compare) -> pc.Expression:
        operands = [node.left, *node.comparators]
        parts = [self._pair(left, op, right) for left, op, right in zip(operands, node.ops, operands[1:], strict=False)]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part
        return joined

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _RefusedError("'is' must be followed by None")
            missing = self._column(left)[0].is_null()
            return ~missing if isinstance(op, ast.IsNot) else missing
        if isinstance(op, ast.In | ast.NotIn):
            column, kind = self._column(left)
            found = column.isin(pa.array(self._constants(right), type=kind))
            return ~found & ~column.is_null() if isinstance(op, ast.NotIn) else found
        compare = _COMPARISONS[type(op)]
        if _is_constant(left):
            column, kind = self._column(right)
            return compare(_cast(_constant(left), kind), column)
        column, kind = self._column(left)
        if _is_constant(right):
            return compare(column, _cast(_constant(right), kind))
        return compare(column, self._column(right)[0])

    def _column(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        match node:
            case ast.Name(id=name):
                pass
            case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
                pass
            case _:
                raise _RefusedError(f"{ast.unparse(node)!r} is not a column")
        if name not in self._schema.names:
            raise _RefusedError(f"the input has no column {name!r}; its columns are: {', '.join(self._schema.names)}")
        self.columns.add(name)
        kind = self._schema.field(name).type
        column = pc.field(name)
        if isinstance(kind, pa.DictionaryType):
            return column.cast(kind.value_type), kind.value_type
        return column, kind

    def _constants(self, node: ast.expr) -> list[object]:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set):
            raise _RefusedError(f"'in' needs a list of constants, got {ast.unparse(node)!r}")
        return [_constant(element) for element in node.elts]


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub))


def _constant(node: ast.expr) -> object:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if not isinstance(node, ast.Constant) or not isinstance(node.value, bool | int | float | str):
        raise _RefusedError(f"{ast.unparse(node)!r} is not a number, text or boolean (compare with None by 'is None')")
    if sign == 1:
        return node.value
    if isinstance(node.value, str | bool):
        raise _RefusedError(f"'-' before {node.value!r}")
    return -node.value


def _cast(value: Any, kind: pa.DataType) -> pc.Expression:
    """A constant of the column's type; numbers beside integer columns keep theirs, so that 1.5 is not cut to 1."""
    constant: Any = pa.scalar(value)
    if isinstance(value, str) or not pa.types.is_integer(kind):
        constant = constant.cast(kind)
    return pc.scalar(constant)


def _problem(text: str, reason: str) -> ConfigError:
    return ConfigError([Problem(FIELD, f"{text!r}: {reason}")])
