"""Who may enter: samples wait in a queue until a place and KV memory for their whole life are free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count, islice

from dspark_batch.core import ErrorCode, Request, RowError, SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.engine.choices import ChoiceTree, ChoiceTrees, ChoiceWalk
from dspark_batch.engine.prefixes import PrefixPool, PrefixUse
from dspark_batch.engine.state import RowState, TokenLog
from dspark_batch.engine.text import Codec, StopStrings
from dspark_batch.sampling.constraints import Constraints
from dspark_batch.sampling.noise import noise_key
from dspark_batch.tensors import Target

_NUM_COMPARED = 8
"""Waiting requests that a prompt is compared with to find what they share."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A checked request and the samples of it that wait. num_tokens: KV positions that one sample can come to need."""

    ticket: int
    request: Request
    token_ids: list[int]
    max_new_tokens: int
    num_tokens: int
    samples: deque[int] = field(default_factory=deque)


def check_prompt(
    request: Request, token_ids: list[int], target: Target, *, max_context: int, choices: ChoiceTree | None = None
) -> RowError | None:
    """Why a tokenised request can never run on this engine, or None. Only more memory can mend that, so only a request
    that lacks memory is retryable."""
    if not token_ids:
        return RowError(code=ErrorCode.EMPTY_PROMPT, message=f"the prompt of {request.id!r} has no tokens")
    bad = next((i for i in token_ids if not 0 <= i < target.vocab_size), None)
    if bad is not None:
        return RowError(
            code=ErrorCode.INVALID_TOKEN_IDS,
            message=f"the prompt of {request.id!r} holds token id {bad}; the vocabulary is 0..{target.vocab_size - 1}",
        )
    if len(token_ids) + (1 if choices is None else choices.max_tokens) > max_context:
        more = "one new token" if choices is None else f"the {choices.max_tokens} of the longest choice"
        return RowError(
            code=ErrorCode.PROMPT_TOO_LONG,
            message=f"the prompt of {request.id!r} has {len(token_ids)} tokens; with {more} it must fit "
            f"into a context of {max_context}",
        )
    num_tokens = min(max_context, len(token_ids) + _most_new_tokens(request.sampling, choices))
    if num_tokens > target.kv.num_total_tokens:
        return RowError(
            code=ErrorCode.PROMPT_TOO_LONG,
            message=f"request {request.id!r} needs KV memory for {num_tokens} tokens and there is room for "
            f"{target.kv.num_total_tokens}; raise engine.kv_cache_gib and try again, or lower max_new_tokens",
            retryable=True,
        )
    return None


def _most_new_tokens(sampling: SamplingParams, choices: ChoiceTree | None) -> int:
    """Tokens behind the prompt, as far as the context goes."""
    return sampling.max_new_tokens if choices is None else choices.max_tokens


class Admission:
    """The queue, and the making of rows. First come, first served; nobody is overtaken for want of memory, so every
    request runs in the end.

    A row reserves prompt and output in full. Drafts need no room of their own: a row never verifies more tokens than
    it may still emit.
    """

    def __init__(
        self,
        target: Target,
        *,
        codec: Codec | None,
        eos_token_ids: frozenset[int],
        constraints: Constraints,
        choices: ChoiceTrees,
        prefixes: PrefixPool | None,
        max_context: int,
    ) -> None:
        self._target = target
        self._codec = codec
        self._eos_token_ids = eos_token_ids
        self._constraints = constraints
        self._choices = choices
        self._prefixes = prefixes
        self._max_context = max_context
        self._queue: deque[QueuedRequest] = deque()
        self._handles = count()
        self.num_queued = 0

    def enqueue(self, ticket: int, request: Request, token_ids: list[int]) -> None:
        """Queue every sample of a request that passed :func:`check_prompt`."""
        num_wanted = _most_new_tokens(request.sampling, self._choices.of(request.sampling))
        max_new_tokens = min(num_wanted, self._max_context - len(token_ids))
        queued = QueuedRequest(ticket, request, token_ids, max_new_tokens, len(token_ids) + max_new_tokens)
        queued.samples.extend(range(request.sampling.n))
        self.num_queued += request.sampling.n
        self._queue.append(queued)

    def admit(self, *, num_places: int) -> list[RowState]:
        """Rows that enter now, at most ``num_places``; each holds its KV slot."""
        rows: list[RowState] = []
        while self._queue and len(rows) < num_places:
            queued = self._queue[0]
            row = self._try(queued)
            if row is None:
                break
            queued.samples.popleft()
            self.num_queued -= 1
            if not queued.samples:
                self._queue.popleft()
            rows.append(row)
        return rows

    def drop_all(self) -> None:
        """Forget everything that waits."""
        self._queue.clear()
        self.num_queued = 0

    def _try(self, queued: QueuedRequest) -> RowState | None:
        use = self._prefix_for(queued)
        slot = self._allocate(queued, use)
        while slot is None and self._prefixes is not None and self._prefixes.drop_idle():
            slot = self._allocate(queued, use)
        if slot is None and use is not None and self._prefixes is not None:
            # The prefix itself may be what takes the room.
            self._prefixes.release(use)
            use = None
            self._prefixes.clear()
            slot = self._allocate(queued, None)
        return None if slot is None else self._row(queued, slot, use)

    def _prefix_for(self, queued: QueuedRequest) -> PrefixUse | None:
        if self._prefixes is None:
            return None
        waiting = (other.token_ids for other in islice(self._queue, 1, 1 + _NUM_COMPARED))
        return self._prefixes.acquire(queued.token_ids, waiting=waiting, num_samples=len(queued.samples))

    def _allocate(self, queued: QueuedRequest, use: PrefixUse | None) -> int | None:
        kv = self._target.kv
        if use is None:
            return kv.allocate(queued.num_tokens)
        return kv.allocate(queued.num_tokens - use.num_tokens, prefix=use.prefix.slot, prefix_len=use.num_tokens)

    def _row(self, queued: QueuedRequest, slot: int, use: PrefixUse | None) -> RowState:
        request, sample = queued.request, queued.samples[0]
        sampling = request.sampling
        choices = self._choices.of(sampling)
        constraint = sampling.constraint if choices is None else None
        token_ids = list(queued.token_ids)
        stop_strings = None
        if sampling.stop and self._codec is not None:
            stop_strings = StopStrings(sampling.stop, self._codec)
        return RowState(
            ticket=queued.ticket,
            request=request,
            sample=sample,
            token_ids=token_ids,
            prompt_len=len(token_ids),
            max_new_tokens=queued.max_new_tokens,
            slot=slot,
            stop_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_token_ids),
            draft_row=DraftRow(
                handle=next(self._handles),
                noise_key=noise_key(sampling.seed, request.id, sample),
                sampling=sampling,
                token_ids=token_ids,
                prompt_len=len(token_ids),
            ),
            kv_len=use.num_tokens if use else 0,
            prefix=use,
            seen=TokenLog(token_ids) if sampling.repetition_penalty != 1.0 else None,
            stop_strings=stop_strings,
            matcher=None if constraint is None else self._constraints.begin(constraint),
            choices=None if choices is None else ChoiceWalk(choices),
        )
