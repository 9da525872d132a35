"""The embedded SmolLM2-135M in float32 against transformers on real prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dspark_batch.core import Message
from dspark_batch.engine.config import EngineConfig
from dspark_batch.models.convert import materialise
from dspark_batch.models.loader import LoadedTarget, load_target
from dspark_batch.models.native import NativeDecoder
from dspark_batch.models.sources import resolve_source
from dspark_batch.testing.flat import FlatDriver

pytestmark = pytest.mark.model

PROMPTS = (
    "A crate holds 12 bottles and each bottle costs 3 dollars. What do 7 crates cost?",
    "Write one sentence that thanks a customer for a kettle review.",
    "Liste drei Gründe, warum Brot schimmelt. 日本語でも答えてください。",
    "def reverse(text):\n    '''Return the text backwards.'''\n",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return materialise(resolve_source("smollm2-135m"))


@pytest.fixture(scope="module")
def loaded() -> LoadedTarget:
    return load_target(EngineConfig(dtype="float32", device="cpu", kv_cache_gib=0.1))


def test_the_conversion_holds_float32_weights_and_a_tied_head(folder: Path, loaded: LoadedTarget) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert loaded.target.spec.tied_head
    assert loaded.eos_token_ids == (2,)
    assert loaded.codec is not None
    assert loaded.codec.has_chat_template
    assert loaded.codec.num_tokens == loaded.target.vocab_size
    assert "/" not in (folder / "config.json").read_text()


def test_logits_equal_transformers_on_real_prompts(folder: Path, loaded: LoadedTarget) -> None:
    """The reference runs in float64: in float32 its own error is 9e-5 at logits around 39 and differs between CPUs.
    The native decoder's is 5e-5; the torch decoder, which serves where there is no compiler, sums less carefully."""
    assert loaded.codec is not None
    tolerance = 1e-4 if isinstance(loaded.target.decoder, NativeDecoder) else 2e-4
    sequences = [loaded.codec.encode_chat((Message("user", text),)) for text in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0] for ids in sequences]
    driver = FlatDriver(loaded.target)
    rows = [driver.add(ids) for ids in sequences]
    driver.finish(rows, [[31, 17], [1, 6, 1]])
    for row, logits in zip(rows, expected, strict=True):
        got = torch.stack(row.logits).double()
        assert (got - logits).abs().max() < tolerance
        assert (got.log_softmax(-1) - logits.log_softmax(-1)).abs().max() < tolerance
        assert torch.equal(got.argmax(-1), logits.argmax(-1))
        loaded.target.kv.free(row.slot)
