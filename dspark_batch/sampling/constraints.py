"""Which tokens may come next, so that a text ends up in a set of choices, a JSON schema, a pattern or a grammar.

Constraints are compiled and followed by llguidance. Nothing here needs torch: a config is checked with it too.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.core import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_NUM_COMPILED = 256
"""Constraints kept ready; one row of a table may bring another than the next."""

_DRAWN = re.compile(r"\d+ \|")
_COMPACT: JsonCompileOptions = {"whitespace_flexible": False}
"""JSON without optional blanks: a model may go on with blanks for ever, and whatever has to come costs no round."""


class HasTokenizer(Protocol):
    """What constraints need of a checkpoint."""

    def tokenizer_json(self) -> str | None:
        """The tokenizer as a ``tokenizer.json`` holds it; None where there is none of this kind."""
        ...


@lru_cache(maxsize=_NUM_COMPILED)
def problem_of(constraint: Constraint) -> str | None:
    """Why a constraint can never be followed, or None; needs no tokenizer."""
    from llguidance import LLMatcher

    try:
        message = LLMatcher.validate_grammar(_grammar(constraint), limits=_limits())
    except ValueError as error:
        message = str(error)
    return _one_line(message) or None


class Matcher:
    """How far one sample has come in its constraint. Drafts are looked at and taken back; only ``commit`` moves it."""

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    @property
    def error(self) -> str | None:
        """Why the constraint cannot be followed any further (it grew too complex), or None."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def forced(self, limit: int) -> list[int]:
        """The next tokens as far as there is no choice, at most ``limit``."""
        tokens: list[int] = self._matcher.compute_ff_tokens() if limit else []
        return tokens[:limit]

    def ending(self, limit: int) -> list[int]:
        """The tokens that complete the text, where there is no choice before its end and they are at most ``limit``."""
        tokens = self.forced(limit + 1)
        if not tokens or len(tokens) > limit:
            return []
        self._matcher.consume_tokens(tokens)
        is_complete = self._matcher.is_stopped()
        self._matcher.rollback(len(tokens))
        return tokens if is_complete else []

    def num_allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft the constraint allows, one after another."""
        return int(self._matcher.validate_tokens(list(draft))) if draft else 0

    def masks(self, draft: Sequence[int]) -> NDArray[np.int32]:
        """[len(draft) + 1, W] bits by token id, set for what may come after each prefix of the draft.

        After a token that is not allowed every bit is set: nothing there can be emitted.
        """
        masks = np.full((len(draft) + 1, self._num_words), -1, np.int32)
        num_followed = 0
        for row in masks:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if num_followed == len(draft) or not self._matcher.try_consume_tokens([draft[num_followed]]):
                break
            num_followed += 1
        if num_followed:
            self._matcher.rollback(num_followed)
        return masks

    def commit(self, token_id: int) -> bool:
        """Follow an emitted token; True when the text is complete and nothing may come after it."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped())


class Constraints:
    """Compiles constraints for one tokenizer, which is read with the first of them; keeps those used last."""

    def __init__(self, source: HasTokenizer | None, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def begin(self, constraint: Constraint) -> Matcher:
        """A new sample's matcher.

        Raises:
            ValueError: the constraint is wrong, or the target has no tokenizer or no end of sequence to follow it with.
        """
        found = self._compiled.get(constraint)
        if found is None:
            found = self._compile(constraint)
            self._compiled[constraint] = found
            if len(self._compiled) > _NUM_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return Matcher(found.deep_copy(), (self._vocab_size + 31) // 32)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        self._tokenizer = self._tokenizer or self._read_tokenizer()
        if (problem := problem_of(constraint)) is not None:
            raise ValueError(f"sampling.{constraint.kind} cannot be followed: {problem}")
        matcher = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=_limits())
        if matcher.is_error():
            raise ValueError(f"sampling.{constraint.kind} cannot be followed: {_one_line(matcher.get_error())}")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._source.tokenizer_json() if self._source is not None else None
        if text is None:
            raise ValueError("constrained text needs a checkpoint with a tokenizer.json")
        if not self._eos_token_ids:
            raise ValueError("constrained text needs a checkpoint with an end-of-sequence token")
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own notation. Raises ValueError where a schema is no JSON."""
    from llguidance import LLMatcher

    if constraint.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(constraint.source, defaults=_COMPACT)
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.source)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.source)
    choices = " | ".join(json.dumps(choice) for choice in json.loads(constraint.source))
    return LLMatcher.grammar_from_lark(f"start: {choices}")


def _one_line(message: str) -> str:
    """Without the drawings that show where in a source something is wrong."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line.strip("^~ ") and not _DRAWN.match(line))


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)
