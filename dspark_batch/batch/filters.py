"""``input.filter``: a small expression language over columns, parsed by Python's grammar and never evaluated by it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dspark_batch.errors import ConfigError, Problem

FIELD = "input.filter"
HELP = (
    "a filter compares columns with constants (==, !=, <, <=, >, >=, in, not in, is None, is not None) and joins "
    "comparisons with and, or, not; column('odd name') names a column that is not a Python name"
)

MAX_DECIMAL_DIGITS = 76
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"

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
    column's type, so dates and timestamps are written as text (``day >= '2026-01-31'``). Beside a number, text is
    read as numbers, and as NULL where it is none.

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

    def condition(self, node: ast.expr, *, negated: bool = False) -> pc.Expression:
        """True for the rows that pass; for others false or NULL.

        Negations are taken down to the single comparisons. Above them false and NULL are then the same.
        """
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.condition(value, negated=negated) for value in values]
                return _all(parts) if isinstance(op, ast.And) != negated else _any(parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.condition(operand, negated=not negated)
            case ast.Compare():
                operands = [node.left, *node.comparators]
                steps = zip(operands, node.ops, operands[1:], strict=False)
                parts = [self._pair(left, op, right, negated=negated) for left, op, right in steps]
                return _any(parts) if negated else _all(parts)
            case _:
                column = self._column(node)[0]
                return ~column if negated else column

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr, *, negated: bool) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _RefusedError("'is' must be followed by None")
            missing = self._column(left)[0].is_null()
            return ~missing if isinstance(op, ast.IsNot) != negated else missing
        if isinstance(op, ast.In | ast.NotIn):
            column, kind = self._column(left)
            found = _is_in(column, kind, self._constants(right))
            return ~found & ~column.is_null() if isinstance(op, ast.NotIn) != negated else found
        compare = _COMPARISONS[type(op)]
        if _is_constant(left):
            constant, column = _comparable(_constant(left), *self._column(right))
            result = compare(constant, column)
        elif _is_constant(right):
            constant, column = _comparable(_constant(right), *self._column(left))
            result = compare(column, constant)
        else:
            result = compare(self._column(left)[0], self._column(right)[0])
        return ~result if negated else result

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


def _all(parts: list[pc.Expression]) -> pc.Expression:
    return reduce(lambda left, right: left & right, parts)


def _any(parts: list[pc.Expression]) -> pc.Expression:
    return reduce(lambda left, right: left | right, parts)


def _comparable(value: Any, column: pc.Expression, kind: pa.DataType) -> tuple[pc.Expression, pc.Expression]:
    """(constant, column) in a type in which both are what they were.

    That is the column's type, except for numbers beside integers (1.5 is not cut to 1), decimals with fewer digits
    than the number, and text, which is read as numbers.
    """
    if _is_number(value) and pa.types.is_decimal(kind):
        return _decimals(value, column, kind)
    if _is_number(value) and _is_text(kind):
        return pc.scalar(float(value)), _as_number(column)
    constant: Any = pa.scalar(value)
    if pa.types.is_null(kind):
        return pc.scalar(constant), column.cast(constant.type)
    if isinstance(value, str) or not pa.types.is_integer(kind):
        constant = constant.cast(kind)
    return pc.scalar(constant), column


def _decimals(value: Any, column: pc.Expression, kind: Any) -> tuple[pc.Expression, pc.Expression]:
    exact: Any = Decimal(str(value))
    try:
        constant: Any = pa.scalar(exact, kind)
    except pa.ArrowException:
        places = max(-int(exact.as_tuple().exponent), kind.scale)
        if kind.precision - kind.scale + places > MAX_DECIMAL_DIGITS:
            raise
        wide = pa.decimal256(MAX_DECIMAL_DIGITS, places)
        constant, column = pa.scalar(exact, wide), column.cast(wide)
    return pc.scalar(constant), column


def _is_in(column: pc.Expression, kind: Any, values: list[Any]) -> pc.Expression:
    if pa.types.is_decimal(kind) and all(map(_is_number, values)):
        return column.isin(pa.array([exact for value in values for exact in _in_type(value, kind)], type=kind))
    if values and _is_text(kind) and all(map(_is_number, values)):
        return _as_number(column).isin(pa.array(list(map(float, values)), pa.float64()))
    if pa.types.is_null(kind):
        constants = pa.array(values)
        return column.cast(constants.type).isin(constants)
    return column.isin(pa.array(values, type=kind))


def _in_type(value: Any, kind: Any) -> list[Any]:
    """The number as a scalar of a decimal type; none where the type cannot hold it, as then no row equals it."""
    try:
        return [pa.scalar(Decimal(str(value)), kind)]
    except pa.ArrowException:
        return []


def _as_number(column: pc.Expression) -> pc.Expression:
    """Text as numbers; NULL where it is none."""
    missing: Any = pa.scalar(None, pa.string())
    number: pc.Expression = pc.if_else(pc.match_substring_regex(column, NUMBER), column, pc.scalar(missing))
    return number.cast(pa.float64())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _problem(text: str, reason: str) -> ConfigError:
    return ConfigError([Problem(FIELD, f"{text!r}: {reason}")])
