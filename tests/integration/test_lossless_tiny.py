"""Whole engine over tiny random checkpoints of every family, against transformers and against itself."""

import json
from pathlib import Path

import pytest

from dspark_batch.bench import lossless
from dspark_batch.bench.options import run_module
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.testing.tiny import save_tiny_checkpoint

PROMPTS = [
    "a b a b a b a",
    "x",
    "Grüße",
    "the cat sat on the mat, the cat sat",
    "0 1 2 3 4 5 6 7 8 9 0 1 2 3",
    "ab" * 20,
    "?!",
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_setting_gives_the_token_ids_of_transformers_or_of_plain_decoding(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_kernels()  # before: in an empty cache they would be compiled again
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_checkpoint(tmp_path / family, family)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    arguments = [str(prompts), "--target", str(folder), "--device", "cpu", "--max-new-tokens", "23"]
    arguments += ["--concurrency", "1,5", "--peer-batch-size", "1", "--json"]
    arguments += ["--drafters", "none,ngram,suffix"]
    assert run_module(lossless.command, arguments) == 0
    comparisons = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(comparisons) == 2 * 3 * 2
    assert all(c["num_rows"] == len(PROMPTS) for c in comparisons)
    assert sum(len(c["differences"]) for c in comparisons) == 0
    assert any(c["accepted_length"] > 1.0 for c in comparisons)
