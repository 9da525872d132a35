"""The equality tests on a CUDA device: same token ids for every setting, and those of transformers when greedy."""

import json
from pathlib import Path

import pytest
import torch

from dspark_batch.bench import lossless
from dspark_batch.bench.options import run_module
from dspark_batch.sampling.noise import noise_bits
from dspark_batch.testing.tiny import save_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["a b a b a b a", "x", "the cat sat on the mat, the cat sat", "0 1 2 3 4 5 6 7 8 9 0 1 2 3", "ab" * 20]


def test_noise_bits_equal_those_of_the_cpu() -> None:
    keys, positions, tokens = torch.randint(-(2**62), 2**62, (37,)), torch.arange(37), torch.arange(0, 150_000, 7)
    on_cpu = noise_bits(keys, positions, tokens)
    on_cuda = noise_bits(keys.cuda(), positions.cuda(), tokens.cuda())
    assert torch.equal(on_cpu, on_cuda.cpu())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_setting_gives_the_same_token_ids(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    folder = save_tiny_checkpoint(tmp_path / family, family)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    arguments = [str(prompts), "--target", str(folder), "--device", "cuda", "--max-new-tokens", "32"]
    arguments += ["--concurrency", "1,3,32", "--peer-batch-size", "1", "--json"]
    assert run_module(lossless.command, arguments) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 12
