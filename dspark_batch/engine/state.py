"""The state of one sample in the engine, from its admission to its result."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark_batch.core import FinishReason, Request, Result, RowError, SamplingParams, TokenLogprobs
from dspark_batch.drafters.base import DraftRow
from dspark_batch.engine.choices import ChoiceWalk
from dspark_batch.engine.prefixes import PrefixUse
from dspark_batch.engine.text import Codec, StopStrings
from dspark_batch.sampling.constraints import Matcher


class TokenLog:
    """A growing int64 array of a row's tokens, for the repetition penalty."""

    def __init__(self, token_ids: list[int]) -> None:
        self._buffer = np.array(token_ids, dtype=np.int64)
        self._length = len(token_ids)

    def append(self, token_id: int) -> None:
        if self._length == len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.empty_like(self._buffer)))
        self._buffer[self._length] = token_id
        self._length += 1

    def view(self) -> NDArray[np.int64]:
        """Copy-free; valid until the next ``append``."""
        return self._buffer[: self._length]


@dataclass(slots=True, eq=False)
class RowState:
    """One sample that holds a KV slot.

    token_ids: prompt and committed output. kv_len: positions whose KV is written and valid. While the row decodes,
    ``kv_len == len(token_ids) - 1``: only the anchor's KV is missing. prefix: the shared prompt prefix that the slot
    reads, if any; the row waits until it is computed. matcher: of the constraint on its text, if any. choices: where
    they are scored instead of a text generated; such a row has no output and is unknown to the drafter.
    """

    ticket: int
    request: Request
    sample: int
    token_ids: list[int]
    prompt_len: int
    max_new_tokens: int
    slot: int
    stop_ids: Set[int]
    draft_row: DraftRow
    kv_len: int = 0
    prefix: PrefixUse | None = None
    seen: TokenLog | None = None
    stop_strings: StopStrings | None = None
    matcher: Matcher | None = None
    choices: ChoiceWalk | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    text_before_stop: str | None = None
    error: RowError | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_pending(self) -> int:
        """Committed tokens without KV: 1 while decoding, more during prefill."""
        return len(self.token_ids) - self.kv_len

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_left(self) -> int:
        """Tokens that it may still emit."""
        return self.max_new_tokens - self.num_output

    @property
    def is_waiting(self) -> bool:
        """Whether the shared prefix that this row reads is still being computed."""
        return self.prefix is not None and not self.prefix.is_ready

    def commit(self, token_id: int) -> bool:
        """Append one emitted token; True when the row ends with it, and why is in ``finish_reason``."""
        self.token_ids.append(token_id)
        if self.seen is not None:
            self.seen.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif self.stop_strings is not None and (text := self.stop_strings.push(token_id)) is not None:
            self.text_before_stop = text
            self.finish_reason = FinishReason.STOP
        elif self.matcher is not None and self.matcher.commit(token_id):
            self.finish_reason = FinishReason.STOP
        elif self.num_output >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason is not None

    def commit_ending(self) -> list[int]:
        """Append what is left of a constrained text that can only end in one way: it needs no forward. Gives the
        tokens."""
        if self.matcher is None or self.sampling.logprobs is not None:
            return []
        ending = self.matcher.ending(self.num_left)
        for number, token_id in enumerate(ending, start=1):
            if self.commit(token_id):
                return ending[:number]
        return []

    def result(self, codec: Codec | None) -> Result:
        """The sample's result, once it has finished or failed."""
        if self.error is not None:
            return Result.failed(self.request, self.error, sample=self.sample, num_prompt_tokens=self.prompt_len)
        assert self.finish_reason is not None, "the row has not finished"
        if self.choices is not None:
            return self._scored(self.choices)
        output = self.token_ids[self.prompt_len :]
        return Result(
            id=self.request.id,
            sample=self.sample,
            text=self._text(output, codec),
            token_ids=tuple(output),
            finish_reason=self.finish_reason,
            num_prompt_tokens=self.prompt_len,
            num_generated_tokens=len(output),
            num_rounds=self.num_rounds,
            num_drafted_tokens=self.num_drafted,
            num_accepted_tokens=self.num_accepted,
            logprobs=None if self.sampling.logprobs is None else tuple(self.logprobs),
        )

    def _scored(self, walk: ChoiceWalk) -> Result:
        best = walk.best
        token_ids = walk.tree.token_ids[best]
        return Result(
            id=self.request.id,
            text=walk.tree.texts[best],
            token_ids=token_ids,
            finish_reason=FinishReason.STOP,
            num_prompt_tokens=self.prompt_len,
            num_generated_tokens=len(token_ids),
            choice_scores=walk.scores,
        )

    def _text(self, output: list[int], codec: Codec | None) -> str | None:
        if codec is None:
            return None
        if self.text_before_stop is not None:
            return self.text_before_stop
        ends_with_stop = bool(output) and output[-1] in self.stop_ids
        return codec.decode(output[:-1] if ends_with_stop else output)
