"""Token rows that training reads: a prompt and the target's own response, saved as Parquet parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import InputError
from dspark_batch.provenance import atomic_write_bytes

TokenIds = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """token_ids: [L] int32, the prompt and then the response. prompt_len: how many of them are prompt."""

    id: str
    token_ids: TokenIds
    prompt_len: int
    temperature: float = 0.0

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_anchors(self) -> int:
        """Response positions that have a token after them."""
        return max(0, len(self.token_ids) - 1 - self.prompt_len)

    def cut(self, max_tokens: int) -> TokenRow:
        """The first ``max_tokens`` of it."""
        return TokenRow(self.id, self.token_ids[:max_tokens], self.prompt_len, self.temperature)


def token_row(row_id: str, prompt: Sequence[int], response: Sequence[int], *, temperature: float = 0.0) -> TokenRow:
    """From two lists of token ids."""
    return TokenRow(row_id, np.asarray([*prompt, *response], dtype=np.int32), len(prompt), temperature)


def usable_rows(rows: Iterable[TokenRow], *, max_tokens: int) -> list[TokenRow]:
    """Rows cut to ``max_tokens``, without those that leave no anchor."""
    return [short for row in rows if (short := row.cut(max_tokens)).num_anchors]


def rows_with_prompts(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The same rows with all of their tokens as response but those at the start that all rows share, at least one."""
    shared = min((row.prompt_len for row in rows), default=1)
    for row in rows:
        differs = row.token_ids[:shared] != rows[0].token_ids[:shared]
        shared = int(differs.argmax()) if differs.any() else shared
    first = max(1, shared)
    return [TokenRow(row.id, row.token_ids, min(row.prompt_len, first), row.temperature) for row in rows]


def write_rows(file: Path, rows: Sequence[TokenRow]) -> None:
    """One Parquet file, whole or absent. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "prompt_token_ids": pa.array([row.token_ids[: row.prompt_len] for row in rows], pa.list_(pa.int32())),
            "response_token_ids": pa.array([row.token_ids[row.prompt_len :] for row in rows], pa.list_(pa.int32())),
            "temperature": pa.array([row.temperature for row in rows], pa.float32()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    atomic_write_bytes(file, sink.getvalue().to_pybytes())


def read_rows(folder: Path) -> list[TokenRow]:
    """All parts of a folder, in the order of their names.

    Raises:
        InputError: a part cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[TokenRow] = []
    for file in sorted(folder.glob("part-*.parquet")):
        try:
            columns = pq.read_table(file).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: cannot be read: {error}; delete it and run the command again") from error
        names = ("id", "prompt_token_ids", "response_token_ids", "temperature")
        for row_id, prompt, response, temperature in zip(*(columns[name] for name in names), strict=True):
            rows.append(token_row(row_id, prompt, response, temperature=temperature))
    return rows
