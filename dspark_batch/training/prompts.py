"""Prompts to train on: from a table, from a finished job, or invented by the target itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_batch.core import FinishReason, Message, Request, Result, SamplingParams
from dspark_batch.errors import ConfigError, InputError, Problem
from dspark_batch.models.text import TextCodec
from dspark_batch.provenance import atomic_write_text
from dspark_batch.training.config import SampledSource, TableSource
from dspark_batch.training.deadline import Deadline
from dspark_batch.training.generation import Generator
from dspark_batch.training.sequences import TokenRow, token_row

_REPLACEMENT = "�"


@dataclass(frozen=True, slots=True)
class UserTurn:
    """How the chat template surrounds a user's words: token ids before them, and the token that ends them."""

    before: tuple[int, ...]
    end: int


def user_turn(codec: TextCodec) -> UserTurn:
    """Found by rendering two different messages: what they share on both sides is the template's.

    Raises:
        ConfigError: the target has no chat template, or one that does not end a user turn by a token of its own.
    """
    if not codec.has_chat_template:
        raise ConfigError([Problem("prompts.sampled", "needs a target with a chat template; give prompts.table")])
    one, other = (codec.encode_chat([Message("user", text)]) for text in ("Ax", "7 z?"))
    shared = min(len(one), len(other))
    before = next((i for i in range(shared) if one[i] != other[i]), shared)
    after = next((i for i in range(shared) if one[-1 - i] != other[-1 - i]), shared)
    if not before or not after:
        problem = Problem("prompts.sampled", "the chat template does not mark user turns; give prompts.table")
        raise ConfigError([problem])
    return UserTurn(tuple(one[:before]), one[len(one) - after])


def sampling_requests(
    section: SampledSource, turn: UserTurn, codec: TextCodec, *, numbers: Iterable[int]
) -> Iterator[Request]:
    """One request per sample number, its opening after the template's tokens. The opening is part of the id."""
    openings = [codec.encode_plain(text) if text else [] for text in section.openings]
    sampling = SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=section.seed,
        stop_token_ids=(turn.end,),
    )
    for number in numbers:
        opening = number % len(openings)
        token_ids = (*turn.before, *openings[opening])
        yield Request(id=f"{opening}:{number}", prompt_token_ids=token_ids, sampling=sampling)


def usable_texts(results: Iterable[Result], section: SampledSource, codec: TextCodec) -> list[str]:
    """Finished user turns of some length, in the order of their samples."""
    texts: dict[int, str] = {}
    for result in results:
        if result.error is not None or result.finish_reason is not FinishReason.STOP:
            continue
        opening, number = map(int, result.id.split(":"))
        begun = section.openings[opening]
        text = (begun + codec.decode(result.token_ids)).strip()
        if len(text) >= section.min_characters and _REPLACEMENT not in text:
            texts[number] = text + section.endings.get(begun, "")
    return [texts[number] for number in sorted(texts)]


def distinct_texts(texts: Iterable[str]) -> list[str]:
    """Without those that differ from an earlier one by case, spaces and punctuation only."""
    distinct: dict[str, str] = {}
    for text in texts:
        distinct.setdefault(re.sub(r"\W+", " ", text).strip().lower(), text)
    return list(distinct.values())


def sample_prompts(section: SampledSource, generator: Generator, *, folder: Path, deadline: Deadline) -> list[TokenRow]:
    """Prompts of the target's own, through its chat template, without responses; saved part by part in ``folder``.

    Raises:
        ConfigError: the target has no tokenizer or no chat template to do this with.
        TimeUpError: the deadline passed between two parts.
    """
    codec = generator.codec
    if codec is None:
        raise ConfigError([Problem("prompts.sampled", "needs a target with a tokenizer; give prompts.table")])
    turn = user_turn(codec)
    texts: list[str] = []
    for part, first in enumerate(range(0, section.num_samples, section.samples_per_part)):
        file = folder / f"sampled-{part:05d}.json"
        if not file.is_file():
            deadline.check()
            numbers = range(first, min(first + section.samples_per_part, section.num_samples))
            results = generator.generate(sampling_requests(section, turn, codec, numbers=numbers))
            atomic_write_text(file, json.dumps(usable_texts(results, section, codec)))
        texts += json.loads(file.read_text(encoding="utf-8"))
    return [
        token_row(f"sampled-{i}", codec.encode_chat([Message("user", text)]), [])
        for i, text in enumerate(distinct_texts(texts))
    ]


def table_prompts(source: TableSource, codec: TextCodec | None, *, name: str) -> list[TokenRow]:
    """Prompts of a table as a job would read them, without responses; rows without a prompt are left out.

    Raises:
        ConfigError, InputError: the table or the template is wrong.
    """
    from dspark_batch.batch.reader import ShardReader
    from dspark_batch.batch.shards import make_plan
    from dspark_batch.job.config import JobConfig, OutputSection

    job = JobConfig(input=source.input, prompt=source.prompt, output=OutputSection(path="unused"))
    plan = make_plan(source.input, max_rows=1024)
    reader = ShardReader(job, plan_schema=plan.schema)
    rows: list[TokenRow] = []
    for shard in plan.shards:
        read = reader.read(shard)
        rows += _rendered(job, read.table, read.ids, codec, name=name)
        if source.max_rows is not None and len(rows) >= source.max_rows:
            break
    reader.close()
    return rows[: source.max_rows]


def job_rows(path: str, codec: TextCodec | None, *, eos_token_ids: Sequence[int]) -> list[TokenRow]:
    """Prompts of a finished job with the responses that it wrote. path: its config.

    Raises:
        ConfigError: the config is wrong, or its output lacks columns that the prompt was made of.
        InputError, OutputError: there is no output yet, or it has neither token ids nor texts to make them of.
    """
    from dspark_batch.batch.commit import read_output
    from dspark_batch.job.loader import absolute_paths, load_config

    job = absolute_paths(load_config(path))
    table = read_output(job.output.path)
    ids = tuple(str(i) for i in range(table.num_rows))
    prompts = {row.id: row for row in _rendered(job, table, ids, codec, name="job")}
    has_ids = job.output.token_ids
    if not has_ids and job.task == "extract":
        raise InputError(
            f"{job.output.path} holds the values of its texts (task: extract) and no token ids; "
            "generate it again with output.token_ids: true, or give prompts.table"
        )
    if not has_ids and codec is None:
        raise InputError(f"{job.output.path} holds no token ids, and the target has no tokenizer")
    outputs = table.column(job.output.name_of("token_ids") if has_ids else job.output.column).to_pylist()
    reasons = table.column(job.output.name_of("finish_reason")).to_pylist()
    rows = []
    for i, (output, reason) in enumerate(zip(outputs, reasons, strict=True)):
        prompt = prompts.get(f"job-{i}")
        if output is None or prompt is None:
            continue
        if not has_ids:
            assert codec is not None, "checked above"
            output = codec.encode_plain(output) + (list(eos_token_ids[:1]) if reason == FinishReason.STOP else [])
        rows.append(token_row(prompt.id, prompt.token_ids.tolist(), output, temperature=job.sampling.temperature))
    return rows


def _rendered(
    job: object, table: object, ids: tuple[str, ...], codec: TextCodec | None, *, name: str
) -> list[TokenRow]:
    import pyarrow as pa

    from dspark_batch.batch.prompts import PromptRenderer
    from dspark_batch.job.config import JobConfig

    assert isinstance(job, JobConfig)
    assert isinstance(table, pa.Table)
    renderer = PromptRenderer(
        job.prompt,
        sampling=SamplingParams(),
        input_schema=table.schema,
        has_chat_template=codec is not None and codec.has_chat_template,
    )
    rows = []
    places = tuple(f"{name}-{i}" for i in ids)
    for row_id, request in zip(places, renderer.render_table(table, ids=places), strict=True):
        if not isinstance(request, Request):
            continue
        rows.append(token_row(row_id, _tokens(request, codec), []))
    return rows


def _tokens(request: Request, codec: TextCodec | None) -> Sequence[int]:
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if codec is None:
        raise ConfigError(
            [Problem("prompts.table", "has text, but the target has no tokenizer; give prompt.token_ids")]
        )
    if request.prompt is not None:
        return codec.encode(request.prompt)
    return codec.encode_chat(request.messages or (), arguments=request.chat_template_arguments)
