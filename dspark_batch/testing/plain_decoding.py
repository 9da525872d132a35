"""The oracle of the engine: one row, one token at a time, no batch, no KV memory, no draft, float64 sampling."""

from __future__ import annotations

from dspark_batch.core import FinishReason, Request
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
        penalised = tokens if sampling.repetition_penalty != 1.0 else []
        tokens.append(reference.draw(logits, sampling, noise_key=key, position=len(tokens), seen=penalised))
        text = LetterCodec().decode(tokens[prompt_len:]) if sampling.stop else ""
        if tokens[-1] in stop_ids or any(s in text for s in sampling.stop):
            return tuple(tokens[prompt_len:]), FinishReason.STOP
    return tuple(tokens[prompt_len:]), FinishReason.LENGTH
