"""A target without weights: its next-token logits are a fixed function of the tokens found in its KV memory.

The KV memory holds the tokens themselves. So a row whose KV bookkeeping is wrong by one position, one slot or one stale
token decodes other tokens than it should, and reading dead (poisoned or never written) KV raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from dspark_batch.core import Message
from dspark_batch.tensors import ForwardBatch, ForwardOutput

_HASH_BASE = 1_000_003
_HASH_MODULUS = (1 << 61) - 1


@dataclass(slots=True, eq=False)
class _Slot:
    tokens: list[float]
    prefix: int | None = None
    prefix_len: int = 0
    num_readers: int = 0
    is_freed: bool = False


class ScriptedKV:
    """A ``KVStore`` that keeps the token of every position, and counts what is reserved."""

    def __init__(self, num_total_tokens: int) -> None:
        self.num_total_tokens = num_total_tokens
        self._slots: dict[int, _Slot] = {}
        self._ids = count()
        self.most_used_tokens = 0

    @property
    def num_used_tokens(self) -> int:
        return sum(len(slot.tokens) for slot in self._slots.values())

    @property
    def num_free_tokens(self) -> int:
        return self.num_total_tokens - self.num_used_tokens

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def allocate(self, num_tokens: int, *, prefix: int | None = None, prefix_len: int = 0) -> int | None:
        assert num_tokens > 0, "an empty reservation"
        if num_tokens > self.num_free_tokens:
            return None
        if prefix is not None:
            shared = self._slots[prefix]
            assert shared.prefix is None, "a prefix of a prefix"
            assert 0 < prefix_len <= len(shared.tokens), "a prefix longer than its slot"
            shared.num_readers += 1
        slot = next(self._ids)
        self._slots[slot] = _Slot([math.nan] * num_tokens, prefix, prefix_len)
        self.most_used_tokens = max(self.most_used_tokens, self.num_used_tokens)
        return slot

    def free(self, slot: int) -> None:
        entry = self._slots[slot]
        assert not entry.is_freed, f"slot {slot} was freed twice"
        entry.is_freed = True
        self._drop_if_unused(slot)

    def poison(self, slot: int, kv_len: int) -> None:
        entry = self._slots[slot]
        start = kv_len - entry.prefix_len
        assert start >= 0, "the shared prefix must not be poisoned"
        entry.tokens[start:] = [math.nan] * (len(entry.tokens) - start)

    def check_integrity(self) -> None:
        assert self.num_used_tokens <= self.num_total_tokens, "more KV reserved than there is"
        readers = [e.prefix for e in self._slots.values() if e.prefix is not None]
        for slot, entry in self._slots.items():
            assert entry.num_readers == readers.count(slot), "a slot's number of readers is wrong"
            assert not entry.is_freed or entry.num_readers, "a freed slot lives on"

    def write(self, slot: int, position: int, token_id: int) -> None:
        entry = self._slots[slot]
        assert not entry.is_freed, f"slot {slot} is written after it was freed"
        at = position - entry.prefix_len
        assert 0 <= at < len(entry.tokens), f"position {position} lies outside the reservation of slot {slot}"
        entry.tokens[at] = token_id

    def read(self, slot: int, end: int) -> list[int]:
        """The tokens at positions 0 .. end-1, as attention would see them."""
        entry = self._slots[slot]
        shared = self._slots[entry.prefix].tokens[: entry.prefix_len] if entry.prefix is not None else []
        tokens = [*shared, *entry.tokens][:end]
        assert len(tokens) == end, "a read past the reservation"
        assert not any(map(math.isnan, tokens)), f"dead KV of slot {slot} was read below position {end}"
        return [int(token) for token in tokens]

    def _drop_if_unused(self, slot: int) -> None:
        entry = self._slots[slot]
        if entry.is_freed and not entry.num_readers:
            del self._slots[slot]
            if entry.prefix is not None:
                self._slots[entry.prefix].num_readers -= 1
                self._drop_if_unused(entry.prefix)


class ScriptedTarget:
    """A ``Target`` over a toy vocabulary. Logits depend strongly on the last two tokens, weakly on all of them.

    contrast: scale of the two-token part; the larger, the more the output repeats itself and the better lookup drafts.
    history: scale of the whole-history part. poisoned_token: after a row contains it, the row's logits are NaN.
    Every forward is kept in ``forwards`` when ``record`` is set.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        max_context: int = 256,
        num_kv_tokens: int = 4096,
        contrast: float = 4.0,
        history: float = 0.5,
        poisoned_token: int | None = None,
        record: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.device = torch.device("cpu")
        self.kv = ScriptedKV(num_kv_tokens)
        self.forwards: list[ForwardBatch] = []
        self._contrast = contrast
        self._history = history
        self._poisoned_token = poisoned_token
        self._record = record

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """hidden [N, 2]: the whole-history hash and the two-token hash. features [T, taps * 2]: position and token."""
        slots = [s.slot for s in batch.slices]
        assert len(set(slots)) == len(slots), "a slot occurs twice in one forward"
        assert sum(s.num_tokens for s in batch.slices) == len(batch.token_ids), "slices and tokens disagree"
        if self._record:
            self.forwards.append(batch)
        tokens = batch.token_ids.tolist()
        wanted = batch.logit_index.tolist()
        assert wanted == sorted(set(wanted)), "logit_index must increase"
        hidden: dict[int, list[float]] = {}
        positions: list[int] = []
        flat = 0
        for part in batch.slices:
            for j in range(part.num_tokens):
                self.kv.write(part.slot, part.kv_len + j, tokens[flat + j])
            positions.extend(range(part.kv_len, part.kv_len + part.num_tokens))
            for at in wanted:
                if flat <= at < flat + part.num_tokens:
                    hidden[at] = self._hidden(self.kv.read(part.slot, part.kv_len + at - flat + 1))
            flat += part.num_tokens
        features = None
        if batch.taps:
            features = torch.tensor([positions, tokens], dtype=torch.float32).T.repeat(1, len(batch.taps))
        stacked = torch.tensor([hidden[at] for at in wanted], dtype=torch.float64).reshape(-1, 2)
        return ForwardOutput(hidden=stacked, features=features)

    def logits(self, hidden: Tensor) -> Tensor:
        vocab = torch.arange(self.vocab_size, dtype=torch.float64)
        strong = ((hidden[:, 1:] + 1) * (vocab + 1) * 0.618034).frac()
        weak = ((hidden[:, :1] + 1) * (vocab + 1) * 0.414214).frac()
        return (self._contrast * strong + self._history * weak).float()

    def expected_logits(self, token_ids: Sequence[int]) -> Tensor:
        """[V], the logits after these tokens, without any KV memory."""
        return self.logits(torch.tensor([self._hidden(token_ids)], dtype=torch.float64))[0]

    def _hidden(self, token_ids: Sequence[int]) -> list[float]:
        if self._poisoned_token in token_ids:
            return [math.nan, math.nan]
        return [_hash(token_ids) % 99_991, _hash(token_ids[-2:]) % 9_973]


def _hash(token_ids: Sequence[int]) -> int:
    value = 17
    for token in token_ids:
        value = (value * _HASH_BASE + token + 1) % _HASH_MODULUS
    return value


class LetterCodec:
    """Token i is a letter or, from 26 on, a digit, a sign or a blank; chats are joined by newlines. num_tokens: as far
    as the vocabulary goes."""

    alphabet = "abcdefghijklmnopqrstuvwxyz .,;:!?0123456789"
    has_chat_template = True

    def __init__(self, num_tokens: int | None = None) -> None:
        self._num_tokens = num_tokens

    def tokenizer_json(self) -> str | None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = self.alphabet[: self._num_tokens].replace(" ", "Ġ")
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        text: str = tokenizer.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        return self.encode_plain(text)

    def encode_plain(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]

    def encode_chat(self, messages: Sequence[Message], *, arguments: Mapping[str, object] | None = None) -> list[int]:
        return self.encode(" ".join(message.content for message in messages))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self.alphabet[i] for i in token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class ScriptedModel:
    """What a loader would give: a scripted target with its codec and stop tokens."""

    target: ScriptedTarget = field(default_factory=ScriptedTarget)
    codec: LetterCodec | None = None
    eos_token_ids: frozenset[int] = frozenset()
    fingerprint: str = "scripted"
