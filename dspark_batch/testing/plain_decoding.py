"""The oracle of the engine: one row, one token at a time, no batch, no KV memory, no draft, float64 sampling."""

from __future__ import annotations

import json
import math
import re

from dspark_batch.core import Constraint, FinishReason, Request
from dspark_batch.sampling import reference
from dspark_batch.sampling.noise import noise_key
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel


def decode_plainly(model: ScriptedModel, request: Request, *, sample: int = 0) -> tuple[tuple[int, ...], FinishReason]:
    """Token ids and the finish reason of one sample of a request with ``prompt_token_ids``."""
    sampling = request.sampling
    assert request.prompt_token_ids is not None, "the oracle takes token ids"
    tokens = list(request.prompt_token_ids)
    prompt_len = len(tokens)
    key = noise_key(sampling.seed, request.id, sample)
    stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(model.eos_token_ids))
    limit = min(sampling.max_new_tokens, model.target.max_context - prompt_len)
    while len(tokens) < prompt_len + limit:
        logits = model.target.expected_logits(tokens).tolist()
        if sampling.constraint is not None:
            allowed = _allowed(_words(sampling.constraint), tokens[prompt_len:], model)
            logits = [logit if i in allowed else -math.inf for i, logit in enumerate(logits)]
        penalised = tokens if sampling.repetition_penalty != 1.0 else []
        tokens.append(reference.draw(logits, sampling, noise_key=key, position=len(tokens), seen=penalised))
        text = LetterCodec().decode(tokens[prompt_len:])
        is_complete = sampling.constraint is not None and _is_complete(_words(sampling.constraint), text)
        if tokens[-1] in stop_ids or any(s in text for s in sampling.stop) or is_complete:
            return tuple(tokens[prompt_len:]), FinishReason.STOP
    return tuple(tokens[prompt_len:]), FinishReason.LENGTH


def _words(constraint: Constraint) -> list[str]:
    """The texts that a constraint of plain words allows."""
    if constraint.kind == "choices":
        return list(map(str, json.loads(constraint.source)))
    if constraint.kind == "regex":
        return constraint.source.split("|")
    return re.findall(r'"(\w+)"', constraint.source)


def _allowed(words: list[str], output: list[int], model: ScriptedModel) -> set[int]:
    text = LetterCodec().decode(output)
    letters = enumerate(LetterCodec.alphabet[: model.target.vocab_size])
    allowed = {i for i, letter in letters if any(word.startswith(text + letter) for word in words)}
    return allowed | (set(model.eos_token_ids) if text in words else set())


def _is_complete(words: list[str], text: str) -> bool:
    return text in words and not any(word.startswith(text) and word != text for word in words)
