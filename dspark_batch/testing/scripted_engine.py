"""An engine without a model: deterministic text, chosen latency, chosen faults. For tests of everything around it."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from dspark_batch.core import ChoiceScores, ErrorCode, FinishReason, Request, Result, RowError
from dspark_batch.errors import EngineError

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


@dataclass(slots=True)
class EngineCounters:
    """What happened to a scripted engine so far."""

    num_requests: int = 0
    num_samples: int = 0
    num_steps: int = 0
    num_idle_slots: int = 0
    """Free slots summed over the steps: 0 as long as the caller keeps the engine's queue filled."""
    max_running: int = 0


@dataclass(slots=True)
class Sample:
    ticket: int
    request: Request
    sample: int
    steps_left: int


class ScriptedEngine:
    """A ``RowEngine`` whose text is a function of (prompt, seed, sample) and, above temperature 0, the request's id.

    A sample takes 1 to ``max_steps`` steps, by its prompt, so that rows finish out of order.

    Args:
        failures: prompt text (the last message of a chat) to the error that its row gets.
        fault_after_rows: ``step`` raises EngineError once this many samples came out.
    """

    def __init__(
        self,
        *,
        max_concurrency: int = 8,
        max_steps: int = 3,
        has_chat_template: bool = False,
        failures: Mapping[str, ErrorCode] | None = None,
        fault_after_rows: int | None = None,
    ) -> None:
        assert max_concurrency >= 1
        assert max_steps >= 1
        self.counters = EngineCounters()
        self.is_closed = False
        self._max_concurrency = max_concurrency
        self._max_steps = max_steps
        self._has_chat_template = has_chat_template
        self._failures = dict(failures or {})
        self._fault_after_rows = fault_after_rows
        self._num_emitted = 0
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def max_concurrency(self) -> int:
        return self._max_concurrency

    @property
    def has_chat_template(self) -> bool:
        return self._has_chat_template

    def add(self, request: Request) -> int:
        ticket = self.counters.num_requests
        self.counters.num_requests += 1
        for sample in range(request.sampling.n):
            steps = 1 + _number("steps", prompt_text(request)) % self._max_steps
            self._waiting.append(Sample(ticket, request, sample, steps))
            self.counters.num_samples += 1
        return ticket

    def step(self) -> list[tuple[int, Result]]:
        if self._fault_after_rows is not None and self._num_emitted >= self._fault_after_rows:
            raise EngineError(f"scripted fault after {self._num_emitted} samples")
        while self._waiting and len(self._running) < self._max_concurrency:
            self._running.append(self._waiting.popleft())
        self.counters.num_steps += 1
        self.counters.num_idle_slots += self._max_concurrency - len(self._running)
        self.counters.max_running = max(self.counters.max_running, len(self._running))
        for sample in self._running:
            sample.steps_left -= 1
        done = [sample for sample in self._running if sample.steps_left == 0]
        self._running = [sample for sample in self._running if sample.steps_left > 0]
        self._num_emitted += len(done)
        return [(sample.ticket, self._result(sample)) for sample in done]

    def show_prompt(self, request: Request) -> tuple[str, int] | RowError:
        return prompt_text(request), len(prompt_text(request).split())

    def close(self) -> None:
        self.is_closed = True

    def _result(self, sample: Sample) -> Result:
        code = self._failures.get(prompt_text(sample.request))
        if code is not None:
            error = RowError(code=code, message="scripted failure", retryable=code is ErrorCode.ENGINE_ERROR)
            return Result.failed(sample.request, error, sample=sample.sample)
        return scripted_result(sample.request, sample=sample.sample)


def prompt_text(request: Request) -> str:
    """The text that decides a scripted result: the raw prompt, the last message, or the token ids."""
    if request.prompt is not None:
        return request.prompt
    if request.messages is not None:
        return request.messages[-1].content
    return str(request.prompt_token_ids)


def scripted_result(request: Request, *, sample: int = 0) -> Result:
    """What a scripted engine gives for a request that does not fail; tests compare with it."""
    params = request.sampling
    who = "" if params.is_greedy else f"{request.id}/{sample}/{params.seed}"
    number = _number("text", str(request.messages), prompt_text(request), who)
    if params.score_choices:
        return _scored(request, number)
    length = 1 + number % params.max_new_tokens % len(WORDS)
    token_ids = tuple((number >> (3 * place)) % len(WORDS) for place in range(length))
    return Result(
        id=request.id,
        sample=sample,
        text=" ".join(WORDS[token] for token in token_ids),
        token_ids=token_ids,
        finish_reason=FinishReason.LENGTH if length == params.max_new_tokens else FinishReason.STOP,
        num_prompt_tokens=len(prompt_text(request).split()),
        num_generated_tokens=length,
        num_rounds=length,
        num_drafted_tokens=2 * length,
        num_accepted_tokens=length,
    )


def _scored(request: Request, number: int) -> Result:
    """The first of the choices, taken in turns, is twice as probable as the next, and so on."""
    assert request.sampling.constraint is not None
    choices: list[str] = json.loads(request.sampling.constraint.source)
    first = number % len(choices)
    weights = {choice: 2.0 ** -((place - first) % len(choices)) for place, choice in enumerate(choices)}
    total = sum(weights.values())
    return Result(
        id=request.id,
        text=choices[first],
        token_ids=(first,),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=len(prompt_text(request).split()),
        num_generated_tokens=1,
        choice_scores=ChoiceScores({choice: weight / total for choice, weight in weights.items()}, coverage=0.5),
    )


def _number(*parts: str) -> int:
    data = "\x1f".join(parts).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
