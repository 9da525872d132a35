"""Bad rows, waiting rows, and the life of an engine."""

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from dspark_batch.core import ErrorCode, FinishReason, Message, Request, RowError, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.errors import ConfigError, EngineError
from dspark_batch.tensors import ForwardBatch, ForwardOutput
from dspark_batch.testing.plain_decoding import decode_plainly
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

SHORT = SamplingParams(max_new_tokens=6)


def engine_of(served: ScriptedModel, **settings: object) -> BatchEngine:
    return BatchEngine(served, EngineConfig.model_validate({"poison_dead_kv": True} | settings))


def good(name: str, length: int = 3) -> Request:
    return Request(id=name, prompt_token_ids=tuple(range(1, length + 1)), sampling=SHORT)


class TemplatelessCodec(LetterCodec):
    has_chat_template = False


class FailingTemplateCodec(LetterCodec):
    def encode_chat(self, messages: object, *, arguments: object = None) -> list[int]:
        raise ValueError("roles must alternate")


class ArgumentCodec(LetterCodec):
    def encode_chat(self, messages: Sequence[Message], *, arguments: Mapping[str, object] | None = None) -> list[int]:
        return self.encode(str((arguments or {}).get("mode", "none"))) + super().encode_chat(messages)


@pytest.mark.parametrize(
    ("request_", "codec", "code"),
    [
        (Request(id="x", prompt_token_ids=()), None, ErrorCode.EMPTY_PROMPT),
        (Request(id="x", prompt=""), LetterCodec(), ErrorCode.EMPTY_PROMPT),
        (Request(id="x", messages=()), LetterCodec(), ErrorCode.EMPTY_PROMPT),
        (Request(id="x", prompt_token_ids=(1, 32)), None, ErrorCode.INVALID_TOKEN_IDS),
        (Request(id="x", prompt_token_ids=(1, -1)), None, ErrorCode.INVALID_TOKEN_IDS),
        (Request(id="x", prompt_token_ids=(1,) * 64), None, ErrorCode.PROMPT_TOO_LONG),
        (Request(id="x", prompt="abc\ud800"), LetterCodec(), ErrorCode.UNDECODABLE_TEXT),
        (Request(id="x", messages=(Message("user", "\udfff"),)), LetterCodec(), ErrorCode.UNDECODABLE_TEXT),
        (Request(id="x", prompt="abc"), None, ErrorCode.UNDECODABLE_TEXT),
        (Request(id="x", messages=(Message("user", "a"),)), TemplatelessCodec(), ErrorCode.TEMPLATE_ERROR),
        (Request(id="x", messages=(Message("user", "a"),)), FailingTemplateCodec(), ErrorCode.TEMPLATE_ERROR),
        (
            Request(id="x", prompt_token_ids=(1,), sampling=SamplingParams(stop=("a",))),
            None,
            ErrorCode.UNDECODABLE_TEXT,
        ),
    ],
)
def test_a_bad_row_comes_back_with_its_reason_and_leaves_the_others_alone(
    request_: Request, codec: LetterCodec | None, code: ErrorCode
) -> None:
    served = ScriptedModel(target=ScriptedTarget(max_context=64), codec=codec)
    with engine_of(served) as engine:
        first, bad, last = engine.generate([good("a"), request_, good("b")])
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.error is not None
    assert bad.error.code is code
    assert not bad.error.retryable
    assert "'x'" in bad.error.message
    assert (first.num_generated_tokens, last.num_generated_tokens) == (6, 6)


def test_a_prompt_is_shown_as_the_model_gets_it() -> None:
    with engine_of(ScriptedModel(codec=LetterCodec())) as engine:
        assert engine.show_prompt(Request(id="a", messages=(Message("user", "hi."),))) == ("hi.", 3)
        refused = engine.show_prompt(Request(id="a", prompt=""))
    assert isinstance(refused, RowError)
    with engine_of(ScriptedModel()) as engine:
        assert engine.show_prompt(good("a")) == ("[1, 2, 3]", 3)


def test_a_requests_arguments_reach_the_chat_template() -> None:
    messages = (Message("user", "hi."),)
    with engine_of(ScriptedModel(codec=ArgumentCodec())) as engine:
        asked = Request(id="a", messages=messages, chat_template_arguments={"mode": "x"}, sampling=SHORT)
        assert engine.show_prompt(asked) == ("xhi.", 4)
        assert engine.show_prompt(Request(id="a", messages=messages)) == ("nonehi.", 7)
        (result,) = engine.generate([asked])
    assert result.num_prompt_tokens == 4
    with pytest.raises(ValueError, match="'a': chat_template_arguments need messages"):
        Request(id="a", prompt="hi.", chat_template_arguments={"mode": "x"})


def test_a_chat_template_that_fails_under_arguments_names_them() -> None:
    messages = (Message("user", "hi."),)
    with engine_of(ScriptedModel(codec=FailingTemplateCodec())) as engine:
        plain = engine.show_prompt(Request(id="a", messages=messages))
        asked = engine.show_prompt(Request(id="a", messages=messages, chat_template_arguments={"tools": 3, "b": 1}))
    assert isinstance(plain, RowError)
    assert isinstance(asked, RowError)
    assert plain.message == "the chat template failed on 'a': roles must alternate"
    assert asked.message == f"{plain.message}; prompt.chat_template_arguments are set (tools, b) and may be the cause"


def test_conversations_that_begin_alike_share_their_prefix() -> None:
    turns = (Message("user", "a long question " * 3), Message("assistant", "an answer"))
    requests = [
        Request(id=text, messages=(*turns, Message("user", text)), sampling=SHORT) for text in ("and why", "so what")
    ]
    served = ScriptedModel(target=ScriptedTarget(vocab_size=len(LetterCodec.alphabet)), codec=LetterCodec())
    found = []
    for share in (True, False):
        with engine_of(served, max_concurrency=2, share_prefixes=share) as engine:
            found.append({result.id: result.token_ids for result in engine.generate(requests)})
            assert (engine.stats.num_shared_prefix_tokens > 0) == share
    assert found[0] == found[1]


def test_every_sample_of_a_bad_request_comes_back() -> None:
    request = Request(id="x", prompt_token_ids=(), sampling=SamplingParams(n=3))
    with engine_of(ScriptedModel()) as engine:
        results = list(engine.generate([request]))
    assert [(r.sample, r.finish_reason) for r in results] == [(i, FinishReason.ERROR) for i in range(3)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_fail_their_row_only(temperature: float) -> None:
    sampling = SamplingParams(max_new_tokens=6, temperature=temperature)
    requests = [
        Request(id=name, prompt_token_ids=prompt, sampling=sampling)
        for name, prompt in [("a", (1, 2)), ("x", (1, 31, 2)), ("b", (4, 5))]
    ]
    clean = ScriptedModel(target=ScriptedTarget(vocab_size=32))
    expected = {r.id: decode_plainly(clean, r)[0] for r in requests}
    served = ScriptedModel(target=ScriptedTarget(vocab_size=32, poisoned_token=31))
    with engine_of(served, max_concurrency=3) as engine:
        results = {r.id: r for r in engine.generate(requests)}
        engine.check_integrity()
    failed = results["x"]
    assert failed.error is not None
    assert failed.error.code is ErrorCode.NON_FINITE_LOGITS
    assert failed.error.retryable, "another device or kernel may compute it"
    assert failed.num_prompt_tokens == 3
    for name in ("a", "b"):
        if 31 not in expected[name]:
            assert results[name].token_ids == expected[name]


def test_rows_wait_for_kv_memory_and_places_are_filled_at_once() -> None:
    served = ScriptedModel(target=ScriptedTarget(num_kv_tokens=30, max_context=64))
    requests = [good(f"row-{i}", 1 + i % 5) for i in range(17)]
    with engine_of(served, max_concurrency=32) as engine:
        for request in requests:
            engine.add(request)
        seen = []
        while engine.num_unfinished:
            seen.extend(result for _, result in engine.step())
            engine.check_integrity()
    assert sorted(r.id for r in seen) == sorted(r.id for r in requests)
    assert {r.id: r.token_ids for r in seen} == {r.id: decode_plainly(served, r)[0] for r in requests}
    assert 20 <= served.target.kv.most_used_tokens <= 30


def test_a_request_larger_than_the_kv_memory_fails_and_says_what_to_change() -> None:
    served = ScriptedModel(target=ScriptedTarget(num_kv_tokens=30, max_context=64))
    with engine_of(served) as engine:
        (result,) = engine.generate([good("x", 28)])
    assert result.error is not None
    assert result.error.code is ErrorCode.PROMPT_TOO_LONG
    assert "34 tokens" in result.error.message
    assert "kv_cache_gib" in result.error.message
    assert result.error.retryable


def test_generate_keeps_the_order_and_reads_its_input_lazily() -> None:
    read = 0

    def source() -> Iterator[Request]:
        nonlocal read
        for i in range(50):
            read += 1
            yield Request(id=str(i), prompt_token_ids=(1 + i % 7,), sampling=SamplingParams(max_new_tokens=1 + i % 9))

    with engine_of(ScriptedModel(), max_concurrency=3) as engine:
        results = engine.generate(source())
        assert next(results).id == "0"
        assert read <= 7
        assert [r.id for r in results] == [str(i) for i in range(1, 50)]


def test_stream_gives_short_rows_before_long_ones() -> None:
    requests = [
        Request(id=str(n), prompt_token_ids=(1,), sampling=SamplingParams(max_new_tokens=n)) for n in (20, 3, 9)
    ]
    with engine_of(ScriptedModel()) as engine:
        assert [r.id for r in engine.stream(requests)] == ["3", "9", "20"]


def test_leaving_a_generator_early_frees_everything() -> None:
    served = ScriptedModel()
    with engine_of(served, max_concurrency=4) as engine:
        for _ in engine.stream([good(str(i)) for i in range(9)]):
            break
        engine.check_integrity()
        assert engine.num_unfinished == 0
        assert served.target.kv.num_slots == 0
        assert len(list(engine.generate([good("again")]))) == 1


def test_generate_refuses_an_engine_that_is_in_use() -> None:
    with engine_of(ScriptedModel()) as engine:
        engine.add(good("a"))
        with pytest.raises(RuntimeError, match="in flight"):
            next(engine.generate([good("b")]))


class BreakingTarget(ScriptedTarget):
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        raise torch.OutOfMemoryError("no memory")


def test_a_device_fault_is_an_engine_error_and_ends_the_engine() -> None:
    engine = engine_of(ScriptedModel(target=BreakingTarget()))
    engine.add(good("a"))
    with pytest.raises(EngineError, match="no memory") as caught:
        engine.step()
    assert caught.value.retriable
    with pytest.raises(EngineError, match="cannot be used"):
        engine.add(good("b"))
    engine.close()


def test_a_closed_engine_says_so() -> None:
    engine = engine_of(ScriptedModel())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.step()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_context": 10_000}, "engine.max_context"),
        ({"drafter": "draft_model"}, "speculation.path"),
        ({"drafter": "dspark", "drafter_path": "somewhere"}, "speculation.drafter"),
    ],
)
def test_settings_without_their_part_are_config_errors(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_of(ScriptedModel(), **settings)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_chunked_prefill_never_passes_the_step_budget() -> None:
    target = ScriptedTarget(record=True)
    requests = [good(f"row-{i}", 5 + 7 * i) for i in range(5)]
    with engine_of(ScriptedModel(target=target), max_step_tokens=16, max_concurrency=4) as engine:
        list(engine.generate(requests))
    assert max(len(batch.token_ids) for batch in target.forwards) == 16
    assert all(len(batch.logit_index) <= 16 for batch in target.forwards)
