"""Prompt prefixes that rows share: found among requests close to each other, computed once, kept while of use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_batch.tensors import KVStore

MIN_PREFIX_TOKENS = 16
MAX_PREFIXES = 4


@dataclass(slots=True, eq=False)
class Prefix:
    """A prompt prefix in a KV slot of its own. features: what a drafter's taps saw of it, piece by piece."""

    token_ids: list[int]
    slot: int
    kv_len: int = 0
    num_users: int = 0
    last_used: int = 0
    features: list[Tensor] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.kv_len

    def all_features(self) -> Tensor:
        """[kv_len, taps*H]; one tensor for all rows that ask, so that they share its memory."""
        if len(self.features) > 1:
            self.features = [torch.cat(self.features)]
        return self.features[0]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixUse:
    """A row's use of the first ``num_tokens`` of a prefix."""

    prefix: Prefix
    num_tokens: int

    @property
    def is_ready(self) -> bool:
        return self.prefix.kv_len >= self.num_tokens


class PrefixPool:
    """At most ``MAX_PREFIXES`` prefixes in at most a quarter of the KV memory; the least recently used one gives way.

    A prefix is tried for where requests close to each other in the queue begin with the same tokens, or where one
    request asks for several samples. Sharing changes no result: the last prompt token is always computed by the row.
    """

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._prefixes: list[Prefix] = []
        self._clock = 0

    def unfinished(self) -> list[Prefix]:
        """Prefixes that rows wait for, oldest first."""
        return [p for p in self._prefixes if p.num_pending and p.num_users]

    def acquire(self, prompt: Sequence[int], *, waiting: Iterable[Sequence[int]], num_samples: int) -> PrefixUse | None:
        """The prefix to be shared by a row with this prompt, made where it pays; None when there is none.

        waiting: the prompts of the requests that come next. num_samples: samples of this request yet to be admitted.
        """
        wanted = len(prompt) - 1
        if num_samples == 1:
            wanted = max((common_length(prompt[:-1], other) for other in waiting), default=0)
        use = self._find(prompt)
        if use is not None:
            # Held from now on, so that making room for a longer one does not drop it.
            use.prefix.num_users += 1
        if wanted >= MIN_PREFIX_TOKENS and (use is None or use.num_tokens < wanted // 2):
            made = self._make(list(prompt[:wanted]))
            if made is not None:
                if use is not None:
                    self.release(use)
                use = PrefixUse(made, wanted)
                made.num_users += 1
        if use is not None:
            self._clock += 1
            use.prefix.last_used = self._clock
        return use

    def release(self, use: PrefixUse) -> None:
        assert use.prefix.num_users > 0, "a prefix was released more often than acquired"
        use.prefix.num_users -= 1

    def drop_idle(self) -> bool:
        """Give up the least recently used prefix that no row reads; False when there is none."""
        idle = [p for p in self._prefixes if not p.num_users]
        if not idle:
            return False
        victim = min(idle, key=lambda p: p.last_used)
        self._prefixes.remove(victim)
        self._kv.free(victim.slot)
        return True

    def clear(self) -> None:
        while self.drop_idle():
            pass

    def check_integrity(self) -> None:
        assert len(self._prefixes) <= MAX_PREFIXES, "more prefixes than allowed"
        for prefix in self._prefixes:
            assert 0 <= prefix.kv_len <= len(prefix.token_ids), "a prefix has more KV than tokens"
            assert prefix.num_users >= 0, "a prefix has a negative number of users"

    def _find(self, prompt: Sequence[int]) -> PrefixUse | None:
        best: PrefixUse | None = None
        for prefix in self._prefixes:
            shared = common_length(prefix.token_ids, prompt[:-1])
            if shared >= MIN_PREFIX_TOKENS and (best is None or shared > best.num_tokens):
                best = PrefixUse(prefix, shared)
        return best

    def _make(self, token_ids: list[int]) -> Prefix | None:
        held = sum(len(p.token_ids) for p in self._prefixes)
        while len(self._prefixes) >= MAX_PREFIXES or (held + len(token_ids)) * 4 > self._kv.num_total_tokens:
            if not self.drop_idle():
                return None
            held = sum(len(p.token_ids) for p in self._prefixes)
        slot = self._kv.allocate(len(token_ids))
        if slot is None:
            return None
        prefix = Prefix(token_ids=token_ids, slot=slot)
        self._prefixes.append(prefix)
        return prefix


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
