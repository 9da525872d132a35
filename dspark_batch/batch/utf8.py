"""Strings that are not valid UTF-8, which readers of Parquet refuse: what is invalid in them becomes U+FFFD."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def valid_utf8(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """The column with U+FFFD for invalid bytes of its strings, nested ones too. A valid column is given back as it is.

    Looks at single values only where something is invalid.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.chunked_array([_repaired(chunk) for chunk in column.chunks], type=column.type)
    return column


def _repaired(array: Any) -> Any:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(_repaired(array.storage))
    if pa.types.is_dictionary(kind):
        # Encoded anew, as two values may have become one.
        return _repaired(array.dictionary_decode()).dictionary_encode().cast(kind)
    stored = _stored_kind(kind)
    if stored is not None:
        values = array.cast(stored).to_pylist()
        return pa.array([None if value is None else value.decode(errors="replace") for value in values], type=kind)
    if not pa.types.is_nested(kind):
        return array
    # Without an offset, which its children would have to share.
    array = array.take(pa.array(range(len(array)), pa.int64()))
    children = [_repaired(child) for child in _children(array)]
    return pa.Array.from_buffers(kind, len(array), array.buffers()[: kind.num_buffers], children=children)


def _stored_kind(kind: pa.DataType) -> pa.DataType | None:
    """The type of a string column's bytes; None for other columns."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    return pa.binary_view() if pa.types.is_string_view(kind) else None


def _children(array: Any) -> list[Any]:
    kind = array.type
    if pa.types.is_struct(kind):
        return [array.field(place) for place in range(kind.num_fields)]
    if pa.types.is_map(kind):
        return [pa.StructArray.from_arrays([array.keys, array.items], fields=[kind.key_field, kind.item_field])]
    return [array.values]
