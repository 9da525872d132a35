"""The vocabulary that all parts share: requests, sampling, results, row errors. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

MAX_LOGPROBS = 64
"""Largest number of alternatives that ``SamplingParams.logprobs`` may ask for."""


MIN_TEMPERATURE = 1e-6
"""Least temperature above 0: logits divided by it are still far from the largest float32."""


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    """A stop token (end of sequence included) or a stop string."""
    LENGTH = "length"
    """``max_new_tokens`` was reached."""
    ERROR = "error"
    """The row failed; ``Result.error`` says why."""


class ErrorCode(StrEnum):
    """The closed list of reasons for which one row can fail while its job goes on."""

    NULL_PROMPT = "null_prompt"
    EMPTY_PROMPT = "empty_prompt"
    TEMPLATE_ERROR = "template_error"
    INVALID_MESSAGES = "invalid_messages"
    INVALID_TOKEN_IDS = "invalid_token_ids"
    INVALID_SAMPLING = "invalid_sampling"
    PROMPT_TOO_LONG = "prompt_too_long"
    UNDECODABLE_TEXT = "undecodable_text"
    CONSTRAINT_ERROR = "constraint_error"
    INCOMPLETE_JSON = "incomplete_json"
    INVALID_JSON = "invalid_json"
    NON_FINITE_LOGITS = "non_finite_logits"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Why one row failed.

    ``retryable`` is true where the same row might succeed in another attempt (``--retry-failed`` tries those again).
    """

    code: ErrorCode
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a generated text has to be.

    source: for ``choices`` a JSON list of texts, one of which it is; a JSON schema, written without optional blanks; a
    regular expression that matches it whole; or a Lark grammar whose ``start`` it is.
    """

    kind: Literal["choices", "json_schema", "regex", "grammar"]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn from the target's distribution.

    The order of the steps is fixed: repetition penalty, constraint, temperature, top-k, top-p, min-p, then one draw by
    keyed Gumbel noise. ``temperature=0`` is greedy and ignores top-k, top-p and min-p. The draw is a function of
    (target logits, ``seed``, request id, sample index, position) and of nothing else. A text under a constraint ends as
    soon as it is complete and nothing may follow.

    ``score_choices``: nothing is drawn; the text is the most probable of the constraint's choices, and
    ``Result.choice_scores`` says how probable each is.

    Raises:
        ValueError: values are out of range; a line of the message for each names the field and the value.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None
    score_choices: bool = False

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            (
                "temperature",
                self.is_greedy or (_finite(self.temperature) and self.temperature >= MIN_TEMPERATURE),
                f"must be 0 (greedy) or finite and at least {MIN_TEMPERATURE:g}",
            ),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1, or None for no limit"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "must lie in [0, 1], or None"),
            (
                "repetition_penalty",
                _finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "must be finite and above 0",
            ),
            ("seed", -(2**63) <= self.seed < 2**63, "must fit in 64 bits"),
            ("n", self.n >= 1, "must be at least 1"),
            ("stop", all(self.stop), "must not contain an empty string"),
            ("stop_token_ids", all(i >= 0 for i in self.stop_token_ids), "must not be negative"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"must lie in [0, {MAX_LOGPROBS}], or None",
            ),
            ("ignore_eos", not (self.ignore_eos and self.constraint), "must be false where the text is constrained"),
            *(self._checks_of_scores() if self.score_choices else ()),
        )
        problems = [f"sampling.{name} {rule}, got {getattr(self, name)!r}" for name, ok, rule in checks if not ok]
        if problems:
            raise ValueError("\n".join(problems))

    def _checks_of_scores(self) -> tuple[tuple[str, bool, str], ...]:
        why = "where choices are scored and nothing is drawn"
        return (
            ("constraint", self.constraint is not None and self.constraint.kind == "choices", f"must be choices {why}"),
            ("temperature", self.is_greedy, f"must be 0 {why}"),
            ("n", self.n == 1, f"must be 1 {why}"),
            ("repetition_penalty", self.repetition_penalty == 1.0, f"must be 1 {why}"),
            ("logprobs", self.logprobs is None, f"must be None {why}"),
            ("stop", not self.stop, f"must be empty {why}"),
            ("stop_token_ids", not self.stop_token_ids, f"must be empty {why}"),
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; rendered by the checkpoint's own chat template."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. Exactly one of ``prompt`` (raw text), ``messages`` (chat template) and ``prompt_token_ids`` is set.

    ``id`` keys the random draw together with the seed, so it should be the row's identity, not its place in a batch.
    ``chat_template_arguments`` are variables for the chat template beside the messages, such as ``enable_thinking``.

    Raises:
        ValueError: none or several of the three prompt fields are set, or there are arguments without messages.
    """

    id: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    chat_template_arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if (self.prompt is None) + (self.messages is None) + (self.prompt_token_ids is None) != 2:
            given = [n for n in ("prompt", "messages", "prompt_token_ids") if getattr(self, n) is not None]
            raise ValueError(
                f"request {self.id!r}: set exactly one of prompt, messages, prompt_token_ids; got {given or 'none'}"
            )
        if self.chat_template_arguments and self.messages is None:
            raise ValueError(f"request {self.id!r}: chat_template_arguments need messages")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the target at one emitted position (natural log, temperature 1, after penalties and among
    the tokens that a constraint allows).

    ``top_token_ids`` and ``top_logprobs`` hold the k best tokens, best first.
    """

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def truncated(self, num_top: int) -> TokenLogprobs:
        """The same with at most ``num_top`` alternatives."""
        if len(self.top_token_ids) <= num_top:
            return self
        return TokenLogprobs(self.token_id, self.logprob, self.top_token_ids[:num_top], self.top_logprobs[:num_top])


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """How probable the choices are as the answer, by the target at temperature 1 and without a constraint.

    coverage: the probability that the answer begins with one of the choices, in the tokens that the tokenizer makes of
    it. probs: the same of each choice, in their order, divided by ``coverage``, so that they add up to 1. Where one
    choice continues another, an answer that begins with both counts for the longer one.
    """

    probs: Mapping[str, float]
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One sample of one request. Failed rows have ``finish_reason=ERROR``, ``text=None`` and ``error`` set.

    Counts are in tokens except ``num_rounds`` (target forwards in which this sample took part after its prefill).
    ``num_generated_tokens`` counts emitted tokens, a stop token included; ``token_ids`` holds exactly those.
    ``text`` is None where the checkpoint has no tokenizer. Where choices were scored, text and tokens are those of the
    most probable one, and there are no rounds.
    """

    id: str
    sample: int = 0
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_rounds: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    choice_scores: ChoiceScores | None = None
    error: RowError | None = None

    @classmethod
    def failed(cls, request: Request, error: RowError, *, sample: int = 0, num_prompt_tokens: int = 0) -> Result:
        """The result of a row that could not be generated."""
        return cls(
            id=request.id,
            sample=sample,
            finish_reason=FinishReason.ERROR,
            num_prompt_tokens=num_prompt_tokens,
            error=error,
        )
