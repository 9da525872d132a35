"""The embedded model: greedy output equals transformers', and sampled output does not depend on the setting."""

import json
from pathlib import Path

import pytest

from dspark_batch.bench import lossless
from dspark_batch.bench.options import run_module

PROMPTS = [
    "Repeat after me, twice: the quick brown fox jumps over the lazy dog.",
    "What is 17 + 25? Answer with a number.",
    "List three colours.",
]


@pytest.mark.model
def test_the_embedded_model_decodes_losslessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in PROMPTS))
    arguments = [str(prompts), "--device", "cpu", "--max-new-tokens", "20", "--peer-batch-size", "1"]
    arguments += ["--concurrency", "1,3", "--json"]
    assert run_module(lossless.command, arguments) == 0
    comparisons = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(comparisons) == 2 * 2 * 2
