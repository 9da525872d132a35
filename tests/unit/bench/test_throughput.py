"""The throughput command around the engine: config without a table, prompt files, figures; one real run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.measure import Measurement
from dspark_batch.bench.prompts import read_prompts, with_sampling
from dspark_batch.bench.suffix_table import labelling_requests, report
from dspark_batch.bench.throughput import CONFIGURED, PLAIN, Plan, bench_config, run_throughput
from dspark_batch.cli import run_cli
from dspark_batch.core import Message, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

REVIEWS = Path(__file__).parents[3] / "configs" / "data" / "product_reviews.parquet"


def write_config(folder: Path, text: str = "sampling: {max_new_tokens: 9}\n") -> Path:
    path = folder / "bench.yaml"
    path.write_text(text)
    return path


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abcab", "b c d", "cc", "dad a dad")))
    return path


def measured(*, tokens: int, wall_s: float) -> Measurement:
    return Measurement(
        num_rows=1,
        num_prompt_tokens=3,
        num_emitted_tokens=tokens,
        num_drafted_tokens=8,
        num_verified_draft_tokens=6,
        num_accepted_tokens=4,
        num_wasted_tokens=4,
        num_steps=5,
        accepted_length=2.0,
        wall_s=wall_s,
        draft_s=0.1,
        forward_s=0.7,
        sample_s=0.1,
        host_s=0.1,
        tail_s=0.5,
    )


@pytest.fixture
def scripted_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig) -> ScriptedModel:
        target = ScriptedTarget(vocab_size=len(LetterCodec.alphabet), contrast=8.0)
        return ScriptedModel(target=target, codec=LetterCodec(), eos_token_ids=frozenset())

    monkeypatch.setattr("dspark_batch.models.loader.load_target", load)


def test_a_config_needs_neither_input_nor_prompt_nor_output(tmp_path: Path) -> None:
    config = bench_config(write_config(tmp_path), overrides=["speculation.drafter=ngram"])
    assert config.sampling.max_new_tokens == 9
    assert config.speculation.drafter == "ngram"


def test_a_job_config_serves_as_it_is_and_mistakes_are_named(tmp_path: Path) -> None:
    quickstart = REVIEWS.parents[1] / "quickstart.yaml"
    assert bench_config(quickstart).sampling.max_new_tokens == 64
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens"):
        bench_config(write_config(tmp_path), overrides=["sampling.max_tokens=3"])


def test_prompt_files_of_all_kinds_are_read(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"turns": ["hello", "later"]}\n\n{"prompt": "raw"}\n')
    chat, raw = read_prompts(lines)
    assert chat.messages == (Message("user", "hello"),)
    assert raw.prompt == "raw"
    assert read_prompts(lines, system="be brief")[1].messages == (Message("system", "be brief"), Message("user", "raw"))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None, "y"]}), table)
    assert [request.prompt for request in read_prompts(table, column="text")] == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "x"}', "line 1: has neither"), ("not json", "line 1: is not JSON"), ("", "holds no prompts")],
)
def test_prompt_files_that_cannot_be_used_say_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "b.jsonl")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="--column of text"):
        read_prompts(tmp_path / "c.parquet")


def test_prompts_go_round_with_ids_of_their_own(tmp_path: Path) -> None:
    requests = with_sampling(read_prompts(write_prompts(tmp_path)), SamplingParams(seed=3), first=3, count=3)
    assert [request.id for request in requests] == ["3", "4", "5"]
    assert [request.prompt for request in requests] == ["dad a dad", "abcab", "b c d"]
    assert requests[0].sampling.seed == 3


@pytest.mark.usefixtures("scripted_loader")
def test_every_setting_runs_the_same_rows_at_every_concurrency(tmp_path: Path) -> None:
    plan = Plan(
        config=write_config(tmp_path), prompts=write_prompts(tmp_path), concurrencies=(1, 3), repeats=2, num_rows=5
    )
    lines: list[str] = []
    found = run_throughput(plan, tell=lines.append)
    assert [(e.concurrency, e.setting) for e in found.entries] == [
        (1, PLAIN),
        (1, CONFIGURED),
        (3, PLAIN),
        (3, CONFIGURED),
    ]
    assert len(lines) == 8
    for entry in found.entries:
        assert [run.num_emitted_tokens for run in entry.runs] == [45, 45]
        assert (entry.total("num_drafted_tokens") == 0) == (entry.setting == PLAIN)
    as_json = json.loads(json.dumps(found.as_dict()))
    assert as_json["entries"][0]["ratio"] == 1.0
    assert {"versions", "device", "commit", "engine", "sampling", "plan"} <= as_json.keys()
    assert found.table().row_count == 4


@pytest.mark.usefixtures("scripted_loader")
def test_the_command_prints_a_table_and_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "throughput", str(write_config(tmp_path)), "--prompts", str(write_prompts(tmp_path))]
    assert run_cli([*arguments, "--concurrency", "2", "--repeats", "1", "--json", "speculation.drafter=none"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert "plain" in "\n".join(out[:-1])
    assert [entry["setting"] for entry in json.loads(out[-1])["entries"]] == ["plain"]


def test_the_lossless_check_is_wired_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "lossless", "--help"]) == 0
    assert "--peer-batch-size" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "0", "1,,2", "a", "-1"])
def test_concurrencies_must_be_positive_whole_numbers(text: str) -> None:
    assert parse_concurrencies("1, 8") == (1, 8)
    with pytest.raises(ConfigError, match="--concurrency"):
        parse_concurrencies(text)


def test_labelling_rows_are_all_different_and_share_their_examples() -> None:
    requests = labelling_requests(REVIEWS, num_rows=200)
    prompts = [request.prompt or "" for request in requests]
    assert len(set(prompts)) == 200
    assert len({prompt[:400] for prompt in prompts}) == 1


def test_the_labelling_report_takes_ratios_per_repeat() -> None:
    plain = [measured(tokens=100, wall_s=1.0), measured(tokens=100, wall_s=4.0)]
    drafted = [measured(tokens=100, wall_s=0.5), measured(tokens=100, wall_s=2.0)]
    assert "2.00x plain" in report({"none": plain, "suffix": drafted})[1]
