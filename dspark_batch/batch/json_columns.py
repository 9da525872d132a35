"""Generated JSON as a typed column: the Arrow type of a JSON schema, and texts as values of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from dspark_batch.core import ErrorCode, FinishReason, Result, RowError

MAX_SHOWN_CHARS = 500
"""How much of a text that did not become a value its row's error holds."""

_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_OF_ONE_KIND = frozenset({"properties", "patternProperties", "additionalProperties", "items", "prefixItems"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value.

    In all parts ``convert`` gives what Arrow takes for a parsed value, or raises ValueError where that does not fit. It
    never gets null, which is NULL everywhere.
    """

    type: pa.DataType
    convert: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class ListPart:
    """A list of values of one type."""

    item: Part

    @property
    def type(self) -> pa.DataType:
        return pa.list_(self.item.type)

    def convert(self, value: Any) -> object:
        if not isinstance(value, list):
            raise _misfit(value, "an array")
        convert = self.item.convert
        return [None if item is None else convert(item) for item in value]


@dataclass(frozen=True, slots=True)
class StructPart:
    """An object of known keys. Those that a value lacks are NULL, others that it has are left out."""

    fields: tuple[tuple[str, Part], ...]

    @property
    def type(self) -> pa.DataType:
        return pa.struct([(name, part.type) for name, part in self.fields])

    def convert(self, value: Any) -> object:
        if not isinstance(value, dict):
            raise _misfit(value, "an object")
        found: dict[str, object] = {}
        for name, part in self.fields:
            given = value.get(name)
            try:
                found[name] = None if given is None else part.convert(given)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found


Part = Scalar | ListPart | StructPart


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonColumn:
    """A column of values that texts of a JSON schema hold. ``max_new_tokens`` is the limit under which they came."""

    part: Part
    max_new_tokens: int

    def read(self, results: Sequence[Result]) -> tuple[list[Result], list[object]]:
        """The results, failed where their text did not become a value, and the value of each; None in failed rows."""
        checked: list[Result] = []
        values: list[object] = []
        for result in results:
            value = None if result.error is not None else self._value(result)
            if isinstance(value, RowError):
                result, value = _failed(result, value), None
            checked.append(result)
            values.append(value)
        return checked, values

    def _value(self, result: Result) -> object:
        """The value, or a RowError."""
        text = result.text or ""
        try:
            parsed = _DECODER.decode(text)
            value = None if parsed is None else self.part.convert(parsed)
        except json.JSONDecodeError:
            return self._incomplete(result)
        except (ValueError, RecursionError) as error:
            return RowError(code=ErrorCode.INVALID_JSON, message=f"{error}. The text begins: {_beginning(text)}")
        if result.finish_reason is FinishReason.LENGTH and type(parsed) in (int, float):
            # More digits might have come; whatever else is whole has its end.
            return self._incomplete(result)
        return value

    def _incomplete(self, result: Result) -> RowError:
        num_tokens = result.num_generated_tokens
        if result.finish_reason is not FinishReason.LENGTH:
            what = "by sampling.stop or sampling.stop_token_ids; change those"
        elif num_tokens < self.max_new_tokens:
            what = "as the context was full; raise engine.max_context, or shorten the prompt"
        else:
            what = "by sampling.max_new_tokens; raise it, or limit strings (maxLength) and lists (maxItems)"
        return RowError(
            code=ErrorCode.INCOMPLETE_JSON,
            message=f"ended after {num_tokens} tokens, before its JSON was whole, {what}. "
            f"The text begins: {_beginning(result.text or '')}",
        )


def json_part(schema: Mapping[str, Any]) -> Part:
    """How a column holds values of a JSON schema.

    Objects with ``properties`` are structs, in the schema's order; arrays with ``items`` are lists; strings, integers
    (64 bits), numbers and booleans are themselves, and so are enumerations of one of these, also in a union with null.
    What has no such type (other objects, mixed unions, tuples, recursive references) is a string that holds compact
    JSON.
    """
    return _part(schema, schema, refs=frozenset({"#"}))


def _part(schema: object, root: Mapping[str, Any], *, refs: frozenset[str]) -> Part:
    """``refs``: the references that led here."""
    if not isinstance(schema, Mapping):
        return JSON_TEXT
    kinds = _kinds(schema)
    kind = kinds[0] if len(kinds) == 1 else ""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if "const" in schema or "enum" in schema:
        return _of_values([schema["const"]] if "const" in schema else schema["enum"])
    combining = [word for word in _COMBINING if word in schema]
    if kind and not combining:
        return _object(schema, root, refs=refs) if kind == "object" else _array(schema, root, refs=refs)
    if kinds or len(combining) != 1 or not _OF_ONE_KIND.isdisjoint(schema):
        return JSON_TEXT
    given = schema[combining[0]]
    return _referenced(given, root, refs=refs) if combining == ["$ref"] else _union(given, root, refs=refs)


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, without null."""
    given = schema.get("type", [])
    return [kind for kind in ([given] if isinstance(given, str) else given) if kind != "null"]


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], *, refs: frozenset[str]) -> Part:
    properties = schema.get("properties", {})
    has_other_keys = schema.get("additionalProperties", False) is not False or "patternProperties" in schema
    # Spark and the table formats tell fields apart without regard to case; Parquet has no empty structs.
    num_names = len({name.lower() for name in properties})
    if has_other_keys or not num_names or num_names < len(properties):
        return JSON_TEXT
    return StructPart(tuple((name, _part(below, root, refs=refs)) for name, below in properties.items()))


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], *, refs: frozenset[str]) -> Part:
    items = schema.get("items")
    if not isinstance(items, Mapping) or "prefixItems" in schema:
        return JSON_TEXT
    return ListPart(_part(items, root, refs=refs))


def _referenced(ref: str, root: Mapping[str, Any], *, refs: frozenset[str]) -> Part:
    if ref in refs or not ref.startswith("#/"):
        return JSON_TEXT
    found: Any = root
    for step in ref[2:].split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return _part(found, root, refs=refs | {ref})


def _union(options: Sequence[object], root: Mapping[str, Any], *, refs: frozenset[str]) -> Part:
    parts = [_part(option, root, refs=refs) for option in options if not _is_null(option)]
    return parts[0] if parts and all(part == parts[0] for part in parts) else JSON_TEXT


def _is_null(schema: object) -> bool:
    return isinstance(schema, Mapping) and (
        schema.get("type") in ("null", ["null"]) or schema.get("enum") == [None] or schema.get("const", "") is None
    )


def _of_values(values: Sequence[object]) -> Part:
    """The part of values that are listed."""
    kinds = {type(value) for value in values if value is not None}
    for kind, part in ((str, STRING), (bool, BOOLEAN), (int, INTEGER)):
        if kinds == {kind}:
            return part
    return NUMBER if kinds and kinds <= {int, float} else JSON_TEXT


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _misfit(value, "a string")
    return _well_formed(value)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _misfit(value, "an integer")
    if not -(2**63) <= value < 2**63:
        raise _beyond(value, "an integer")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _misfit(value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _beyond(value, "a number") from None


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _misfit(value, "a boolean")
    return value


def _json_text(value: object) -> str:
    return _well_formed(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _well_formed(text: str) -> str:
    """With U+FFFD for halves of surrogate pairs, which JSON can name and no UTF-8 holds."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _beyond(text, "a number")
    return value


def _refused_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _misfit(value: object, wanted: str) -> ValueError:
    return ValueError(f"{_shown(json.dumps(value))} is not {wanted}, as the schema says")


def _beyond(value: object, what: str) -> ValueError:
    return ValueError(f"{_shown(value)} is beyond {what} of 64 bits; give it a minimum and a maximum in the schema")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _failed(result: Result, error: RowError) -> Result:
    """The result as that of a failed row; what it took stays."""
    return replace(result, text=None, token_ids=(), finish_reason=FinishReason.ERROR, logprobs=None, error=error)


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refused_constant)

STRING = Scalar(pa.string(), _string)
INTEGER = Scalar(pa.int64(), _integer)
NUMBER = Scalar(pa.float64(), _number)
BOOLEAN = Scalar(pa.bool_(), _boolean)
JSON_TEXT = Scalar(pa.string(), _json_text)
"""What has no plain type."""

_SCALARS = {"string": STRING, "integer": INTEGER, "number": NUMBER, "boolean": BOOLEAN}
