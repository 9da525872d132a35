"""The engine on the native kernels in bfloat16: drafts change neither a token nor a bit of its log-probability."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.loader import LoadedTarget
from dspark_batch.models.native import NativeDecoder
from dspark_batch.sampling.noise import noise_key
from dspark_batch.testing.scripted_drafters import OracleDrafter, RandomDrafter
from dspark_batch.testing.tiny import load_tiny, save_tiny_checkpoint

VOCAB = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedTarget]:
    if load_kernels() is None:
        pytest.skip("no native kernels")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    heads_of_16 = {"num_attention_heads": 3, "num_key_value_heads": 1}
    few_tokens = {"vocab_size": VOCAB, "bos_token_id": 37, "eos_token_id": 38, "pad_token_id": 39}
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer=False, **heads_of_16, **few_tokens)
    loaded = load_tiny(folder, dtype="bfloat16")
    assert isinstance(loaded.target.decoder, NativeDecoder)
    yield loaded
    torch.set_num_threads(before)


def requests() -> list[Request]:
    rng = random.Random(7)
    samplings = (
        SamplingParams(max_new_tokens=40, ignore_eos=True),
        SamplingParams(max_new_tokens=25, ignore_eos=True, logprobs=3),
        SamplingParams(max_new_tokens=33, temperature=0.9, ignore_eos=True, logprobs=3),
        SamplingParams(max_new_tokens=17, temperature=1.3, top_p=0.9, repetition_penalty=1.2),
    )
    return [
        Request(
            id=f"row-{i}",
            prompt_token_ids=tuple(rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 9, 31, 70)))),
            sampling=samplings[i % len(samplings)],
        )
        for i in range(16)
    ]


def outputs(
    tiny: LoadedTarget, drafter: Drafter, *, concurrency: int, max_step_tokens: int
) -> dict[str, tuple[object, ...]]:
    config = EngineConfig(
        max_concurrency=concurrency,
        max_step_tokens=max_step_tokens,
        max_draft_tokens=7,
        schedule="fixed",
        poison_dead_kv=True,
    )
    with BatchEngine(tiny, config, drafter=drafter) as engine:
        results = list(engine.generate(requests()))
        assert (engine.stats.num_accepted_tokens > 0) == bool(drafter.max_draft_tokens)
    return {result.id: (*result.token_ids, result.logprobs) for result in results}


@pytest.mark.parametrize("drafter_name", ["random", "erring"])
def test_in_bfloat16_speculative_output_equals_plain_output_bit_for_bit(tiny: LoadedTarget, drafter_name: str) -> None:
    plain = outputs(tiny, NoDrafter(), concurrency=1, max_step_tokens=256)
    texts = {noise_key(0, row.id, 0): [*(row.prompt_token_ids or ()), *plain[row.id][:-1]] for row in requests()}
    for concurrency, max_step_tokens in ((1, 256), (5, 256), (16, 37)):
        drafter: Drafter = RandomDrafter(vocab_size=VOCAB, max_draft_tokens=7, seed=concurrency)
        if drafter_name == "erring":
            drafter = OracleDrafter(texts, max_draft_tokens=7, error_rate=0.3, seed=concurrency)
        assert outputs(tiny, drafter, concurrency=concurrency, max_step_tokens=max_step_tokens) == plain
