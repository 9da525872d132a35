"""Prompt templates: sandboxed, bounded Jinja2, and a fast path for templates that only insert columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARS = 16 * 2**20
"""Longest text that a template may render to; far above every model's context, far below what ends a process."""

MAX_POWER_BITS = 4096

ROW = "row"
"""The variable whose subscripts are columns of any name."""

TEXT_FILTERS = frozenset(
    [
        "capitalize",
        "center",
        "e",
        "escape",
        "forceescape",
        "join",
        "lower",
        "replace",
        "string",
        "striptags",
        "title",
        "trim",
        "truncate",
        "upper",
        "urlencode",
        "wordcount",
        "wordwrap",
    ]
)
SHOWN, SHOWN_ITEMS = "_shown", "_shown_items"


class TooLongError(ValueError):
    """A template rendered to more than ``MAX_PROMPT_CHARS`` characters."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no arithmetic can run away with the process: results of ``**`` and ``*`` are bounded."""

    intercepted_binops = frozenset({"**", "*", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Raises SecurityError where the result would be too large."""
        if operator == "**" and _power_bits(left, right) > MAX_POWER_BITS:
            raise SecurityError(f"{_short(left)} ** {_short(right)} is too large")
        if operator == "*" and _product_length(left, right) > MAX_PROMPT_CHARS:
            raise SecurityError(f"repeating a text or list {_short(left)} * {_short(right)} times is too much")
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("text % values is not allowed, as a width in it is not bounded; use ~ to join")
        return super().call_binop(context, operator, left, right)


class CompiledTemplate:
    """One template over column values, in the order of ``columns``.

    A column is a variable, or ``row["its name"]``. It wins over a global function of its name, which only a call means.
    NULL is None in conditions and an empty text wherever it becomes text. A template of plain text and bare
    ``{{ column }}`` is joined from its pieces, a few times faster than Jinja2 and with the same text;
    ``use_fast_path=False`` renders it by Jinja2 as well, for comparison.

    Raises:
        jinja2.TemplateSyntaxError: the text does not parse, or uses ``row`` or ``self`` in another way.
    """

    def __init__(self, text: str, *, use_fast_path: bool = True) -> None:
        environment = BoundedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_shown)
        environment.filters[SHOWN] = _shown
        environment.filters[SHOWN_ITEMS] = _shown_items
        tree = environment.parse(text)
        _refuse_bare_self(tree)
        functions = _called_names(tree)
        environment.globals = {name: value for name, value in environment.globals.items() if name in functions}
        self._variables = meta.find_undeclared_variables(tree)
        self._subscripts = _subscripts_of_row(tree) if ROW in self._variables else set()
        if self._subscripts:
            self._variables.remove(ROW)
        self.columns = tuple(sorted(self._variables | self._subscripts))
        self._pieces = _simple_pieces(tree, columns=self.columns) if use_fast_path else None
        _show_nulls_as_empty(tree)
        self._template = environment.from_string(tree)
        self._constant = "".join([part for _, part in self._pieces or ()])

    def render(self, row: Mapping[str, object]) -> str:
        """The text for a row. Raises what the template raises, SecurityError and TooLongError."""
        pieces = self._pieces
        if pieces is None:
            return self._render_slowly(row)
        if not self.columns:
            return self._constant
        text = "".join([part if name is None else str(_shown(row[name])) for name, part in pieces])
        return text if len(text) <= MAX_PROMPT_CHARS else _bounded(text)

    def join_texts(self, columns: Mapping[str, Sequence[str | None]], *, num_rows: int) -> list[str] | None:
        """What ``render`` gives for every row, where all columns are text or None; many times faster.

        None where the template does more than insert columns, and where ``render`` would refuse a row.
        """
        if self._pieces is None or not is_unicode(self._constant):
            return None
        parts: list[Iterable[str]] = [
            repeat(part, num_rows) if name is None else _shown_items(columns[name]) for name, part in self._pieces
        ]
        texts = list(map("".join, zip(*parts, strict=True))) if parts else [""] * num_rows
        return texts if max(map(len, texts), default=0) <= MAX_PROMPT_CHARS else None

    def _render_slowly(self, row: Mapping[str, object]) -> str:
        values = {name: row[name] for name in self._variables}
        if self._subscripts:
            values[ROW] = {name: row[name] for name in self._subscripts}
        context = self._template.new_context(values)
        parts: list[str] = []
        length = 0
        for part in self._template.root_render_func(context):
            parts.append(part)
            length += len(part)
            if length > MAX_PROMPT_CHARS:
                break
        return _bounded("".join(parts))


def _called_names(tree: nodes.Template) -> set[str]:
    """Names that stand in calls only."""
    called = [call.node for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    others = {name.name for name in tree.find_all(nodes.Name) if not any(name is node for node in called)}
    return {name.name for name in called} - others


def _simple_pieces(tree: nodes.Template, *, columns: tuple[str, ...]) -> list[tuple[str | None, str]] | None:
    """(column, "") or (None, text) in order; None where the template does more than that."""
    pieces: list[tuple[str | None, str]] = []
    for statement in tree.body:
        if not isinstance(statement, nodes.Output):
            return None
        for node in statement.nodes:
            if isinstance(node, nodes.TemplateData):
                pieces.append((None, node.data))
            elif isinstance(node, nodes.Name) and node.name in columns:
                pieces.append((node.name, ""))
            elif (name := _subscript_of_row(node)) in columns:
                pieces.append((name, ""))
            else:
                return None
    return pieces


def _refuse_bare_self(tree: nodes.Template) -> None:
    """``self`` names the template, whose blocks are attributes. By itself a column of that name is meant."""
    owners = [node.node for node in tree.find_all(nodes.Getattr)]
    for name in tree.find_all(nodes.Name):
        if name.name == "self" and not any(name is owner for owner in owners):
            raise jinja2.TemplateSyntaxError(
                'self is the template itself; a column of that name is row["self"]', name.lineno
            )


def _subscripts_of_row(tree: nodes.Template) -> set[str]:
    """The columns that stand as ``row["name"]``; none where ``row`` is a column like others."""
    places = [node for node in tree.find_all(nodes.Getitem) if _is_row(node.node)]
    if not places:
        return set()
    names = {_subscript_of_row(node): node.lineno for node in places}
    if None in names or len(places) < sum(map(_is_row, tree.find_all(nodes.Name))):
        raise jinja2.TemplateSyntaxError(
            'row stands for the whole row, and takes the name of a column in quotes: row["some name"]',
            names.get(None, places[0].lineno),
        )
    return {name for name in names if name is not None}


def _subscript_of_row(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Getitem) and _is_row(node.node) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == ROW


def _show_nulls_as_empty(tree: nodes.Template) -> None:
    """Let what makes text of values other than by output see NULL as an empty text."""
    for concat in tree.find_all(nodes.Concat):
        concat.nodes = [_filtered(node, SHOWN) for node in concat.nodes]
    for used in tree.find_all(nodes.Filter):
        if used.name in TEXT_FILTERS and used.node is not None:
            used.node = _filtered(used.node, SHOWN_ITEMS if used.name == "join" else SHOWN)
    assert tree.environment is not None
    tree.set_environment(tree.environment)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _shown(value: Any) -> Any:
    """NULL as a template shows it."""
    return "" if value is None else value


def _shown_items(values: Iterable[Any]) -> list[Any]:
    return ["" if value is None else value for value in values]


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: no half of a character stands in it alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounded(text: str) -> str:
    if len(text) > MAX_PROMPT_CHARS:
        raise TooLongError(f"the text has more than {MAX_PROMPT_CHARS} characters")
    return text


def _power_bits(left: object, right: object) -> float:
    if not isinstance(left, int) or not isinstance(right, int) or right < 0:
        return 0
    return max(abs(left).bit_length(), 1) * right


def _product_length(left: object, right: object) -> int:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            return len(value) * max(count, 0)
    return 0


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"<number of {value.bit_length()} bits>"
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
