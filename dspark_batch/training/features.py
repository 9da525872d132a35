"""Target features that are kept while the target responds, so that training need not run the target again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.errors import InputError
from dspark_batch.provenance import atomic_write_bytes
from dspark_batch.tensors import DraftBlock

_TAPS = "taps"


@dataclass(slots=True)
class FeatureRecorder:
    """Fulfils ``drafters.base.Drafter`` without ever drafting: it keeps what the tapped layers say of every row.

    taps: increasing target layers, the last of the target too if wanted. Memory grows with the finished rows until
    they are taken.
    """

    taps: tuple[int, ...]
    name: str = "features"
    max_draft_tokens: int = 0
    _rows: dict[int, list[Tensor]] = field(default_factory=dict)
    _finished: dict[bytes, Tensor] = field(default_factory=dict)

    def add(self, row: DraftRow) -> None:
        self._rows[row.handle] = []

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        return DraftBlock(token_ids=[()] * len(rows))

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        for one in committed:
            self._rows[one.row.handle].append(features[one.offset : one.offset + one.num_tokens].cpu().clone())

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        parts = self._rows.pop(row.handle)
        if finished:
            self._finished[_key(row.token_ids)] = torch.cat(parts)

    def take(self, token_ids: Sequence[int]) -> Tensor | None:
        """[L - 1, taps * H] of a finished row with these L tokens, prompt and response; None for an unknown one.

        The last token was never computed. Equal rows have equal features, and one taker.
        """
        return self._finished.pop(_key(token_ids), None)

    def forget(self) -> None:
        """Drop finished rows that nobody took."""
        self._finished.clear()

    def check_integrity(self) -> None:
        assert all(parts is not None for parts in self._rows.values()), "a row has no list of features"


def write_features(file: Path, features: Mapping[str, Tensor], *, taps: tuple[int, ...]) -> None:
    """By row id, as one safetensors file, whole or absent. Raises OSError."""
    tensors = {row_id: tensor.contiguous() for row_id, tensor in features.items()}
    atomic_write_bytes(file, save(tensors, metadata={_TAPS: ",".join(map(str, taps))}))


class FeatureFiles:
    """The features of a folder by row id, read on demand.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._places: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for file in sorted(folder.glob("features-*.safetensors")):
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
                taps = tuple(map(int, handle.metadata()[_TAPS].split(",")))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file}: cannot be read: {error}; delete it, and it is computed again") from error
            for row_id in handle.keys():  # noqa: SIM118 - the handle is no mapping
                self._places[row_id] = handle, taps

    def get(self, row_id: str, *, taps: Sequence[int]) -> Tensor | None:
        """[L - 1, len(taps) * H] of the layers asked for; None where the row, or one of the layers, is not there."""
        handle, kept = self._places.get(row_id, (None, ()))
        if handle is None or not set(taps) <= set(kept):
            return None
        stored: Tensor = handle.get_tensor(row_id)
        parts = stored.view(stored.shape[0], len(kept), -1)
        return parts[:, [kept.index(tap) for tap in taps]].flatten(1)


def _key(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype=np.int64).tobytes()
