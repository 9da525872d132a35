"""The suffix drafter's search in native code: one call to read the new tokens of all rows, one for all drafts."""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.suffix_index import Ints, RingArrays, SuffixIndex
from dspark_batch.drafters.suffix_search import Drafts, SearchRules
from dspark_batch.models.kernels.library import Kernels

MAX_DRAFT_TOKENS = 64
MAX_CANDIDATES = 64

_P, _L, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Rings(ctypes.Structure):
    _fields_ = (
        ("tokens", _P),
        ("cells", _P),
        ("newest", _P),
        ("start", _P),
        ("end", _P),
        ("coefficients", _P),
        ("orders", _P),
        ("num_orders", _L),
        ("size", _L),
    )


class _Rules(ctypes.Structure):
    _fields_ = (("longest", _P), ("prior", _P), ("min_survival", _D), ("max_candidates", _L))


class _View:
    """An index as native code sees it, for as long as it keeps these arrays."""

    def __init__(self, index: SuffixIndex) -> None:
        self.arrays: RingArrays = index.arrays
        self._coefficients, self._orders = index.coefficients, np.array(index.orders, np.int64)
        arrays = (*self._parts(), self._coefficients, self._orders)
        assert all(array.flags.c_contiguous for array in arrays)
        self.rings = _Rings(*(array.ctypes.data for array in arrays), len(index.orders), index.size)
        self.address = ctypes.addressof(self.rings)

    def _parts(self) -> tuple[NDArray[Any], ...]:
        arrays = self.arrays
        return arrays.tokens, arrays.cells, arrays.newest, arrays.start, arrays.end


class NativeSearch:
    """Fulfils ``SuffixSearch``, with the drafts of ``NumpySearch`` to the last bit of their confidences.

    depth: the longest order of the indexes it is used with. max_draft_tokens: the most tokens that are asked for.
    """

    def __init__(self, rules: SearchRules, kernels: Kernels, *, depth: int, max_draft_tokens: int) -> None:
        assert max_draft_tokens <= MAX_DRAFT_TOKENS, max_draft_tokens
        assert rules.max_candidates <= MAX_CANDIDATES, rules.max_candidates
        self._lib = kernels.lib
        self._max_draft_tokens = max_draft_tokens
        matches = np.arange(depth + 1)
        longest = np.floor(rules.length_factor * matches + rules.length_offset)
        self._longest = np.clip(longest, 0, max_draft_tokens).astype(np.int64)
        contexts = np.arange(depth + max_draft_tokens)
        self._prior = contexts / (contexts + 1.0)
        self._rules = _Rules(
            self._longest.ctypes.data, self._prior.ctypes.data, rules.min_survival, rules.max_candidates
        )
        self._views: WeakKeyDictionary[SuffixIndex, _View] = WeakKeyDictionary()

    def extend(self, index: SuffixIndex, rings: Ints, tokens: Ints, counts: Ints) -> None:
        self._lib.ds_suffix_extend(
            self._view(index), rings.ctypes.data, tokens.ctypes.data, counts.ctypes.data, len(rings)
        )

    def clear(self, index: SuffixIndex, ring: int) -> None:
        self._lib.ds_suffix_clear(self._view(index), ring)

    def drafts(self, own: SuffixIndex, shared: SuffixIndex, rings: Ints, max_tokens: Ints) -> Drafts:
        num_rows, width = len(rings), self._max_draft_tokens
        num_tokens = np.empty(num_rows, np.int64)
        token_ids = np.empty((num_rows, width), np.int64)
        confidence = np.empty((num_rows, width))
        self._lib.ds_suffix_choose(
            self._view(own),
            self._view(shared),
            ctypes.addressof(self._rules),
            rings.ctypes.data,
            max_tokens.ctypes.data,
            num_rows,
            width,
            token_ids.ctypes.data,
            confidence.ctypes.data,
            num_tokens.ctypes.data,
        )
        return Drafts(num_tokens, token_ids, confidence)

    def _view(self, index: SuffixIndex) -> int:
        """The address of the index's description."""
        view = self._views.get(index)
        if view is None or view.arrays is not index.arrays:
            view = self._views[index] = _View(index)
        return view.address
