"""Tokens and text: chat templates, special tokens, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dspark_batch.core import Message
from dspark_batch.errors import ModelError
from dspark_batch.models.text import IncrementalDecoder, TextCodec


@pytest.fixture(scope="module")
def codec(checkpoint: Callable[..., Path]) -> TextCodec:
    codec = TextCodec.from_folder(checkpoint("llama"))
    assert codec is not None
    return codec


def test_text_comes_back_from_its_tokens(codec: TextCodec) -> None:
    text = "Grüße, 世界! 🙂\n\ttabs"
    assert codec.decode(codec.encode(text)) == text
    assert len(codec.encode(text)) == len(text.encode())


def test_special_tokens_are_skipped_unless_wanted(codec: TextCodec) -> None:
    ids = [*codec.encode("hi"), 257]
    assert codec.decode(ids) == "hi"
    assert codec.decode(ids, skip_special_tokens=False) == "hi<|end|>"


def test_a_chat_is_rendered_by_the_template(codec: TextCodec) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hi?"))
    ids = codec.encode_chat(turns)
    expected = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi?<|end|>\n<|start|>assistant\n"
    assert codec.decode(ids, skip_special_tokens=False) == expected
    closed = codec.encode_chat(turns, add_generation_prompt=False)
    assert ids[: len(closed)] == closed
    assert 256 in ids


def test_arguments_reach_the_chat_template(checkpoint: Callable[..., Path]) -> None:
    asking = TextCodec.from_folder(checkpoint("llama"))
    assert asking is not None
    asking._tokenizer.chat_template = "{{ messages[0].content }}{{ mode is defined }} {{ mode }} {{ tools | length }}"
    turns = (Message("user", "Hi?"),)
    ids = asking.encode_chat(turns, arguments={"mode": [1, None], "tools": [{"type": "function"}]})
    assert asking.decode(ids) == "Hi?True [1, None] 1"
    asking._tokenizer.chat_template = "{{ mode is defined }}"
    assert asking.decode(asking.encode_chat(turns)) == "False"


def test_without_a_template_a_chat_is_refused(codec: TextCodec, checkpoint: Callable[..., Path]) -> None:
    bare = TextCodec.from_folder(checkpoint("llama"))
    assert bare is not None
    assert codec.has_chat_template
    bare._tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        bare.encode_chat((Message("user", "x"),))


def test_a_template_that_refuses_the_messages_is_a_value_error(checkpoint: Callable[..., Path]) -> None:
    strict = TextCodec.from_folder(checkpoint("llama"))
    assert strict is not None
    strict._tokenizer.chat_template = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(ValueError, match="system role not supported"):
        strict.encode_chat((Message("system", "x"),))


def test_a_damaged_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer in"):
        TextCodec.from_folder(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=24), cuts=st.lists(st.integers(1, 5), max_size=20))
def test_incremental_text_equals_the_text_decoded_at_once(codec: TextCodec, text: str, cuts: list[int]) -> None:
    ids = codec.encode(text)
    decoder = IncrementalDecoder(codec)
    pieces, at = [], 0
    for cut in [*cuts, len(ids)]:
        pieces.append(decoder.append(ids[at : at + cut]))
        at += cut
        assert "".join(pieces) == decoder.text
        assert codec.decode(ids).startswith(decoder.text)
    assert decoder.finish() == codec.decode(ids)


def test_half_a_character_is_held_back_and_shown_at_the_end(codec: TextCodec) -> None:
    ids = codec.encode("a🙂")
    decoder = IncrementalDecoder(codec)
    assert decoder.append(ids[:3]) == "a"
    assert decoder.text == "a"
    assert decoder.finish().startswith("a\ufffd")


def test_special_tokens_add_no_text(codec: TextCodec) -> None:
    decoder = IncrementalDecoder(codec)
    assert decoder.append([*codec.encode("a"), 257, *codec.encode("b"), 257]) == "ab"
    assert decoder.finish() == "ab"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(0, 258), st.sampled_from(["🙂", "é", "�", " a"])), max_size=60))
def test_incremental_text_of_any_tokens_equals_the_text_decoded_at_once(
    codec: TextCodec, parts: list[int | str]
) -> None:
    ids = [i for part in parts for i in (codec.encode(part) if isinstance(part, str) else [part])]
    decoder, shown = IncrementalDecoder(codec), ""
    for end in range(1, len(ids) + 1):
        shown += decoder.append([ids[end - 1]])
        assert codec.decode(ids[:end]).startswith(shown)
    assert decoder.finish() == codec.decode(ids)


@pytest.mark.parametrize("text", [b"<|end|>", b"\x99", b"\xf0\x9f\x99", "�".encode(), b"\xf0<|end|><|end|>"])
def test_tokens_that_show_nothing_cost_the_same_however_many_there_are(
    codec: TextCodec, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_of_byte = dict(zip("🙂�".encode(), codec.encode("🙂�"), strict=True))
    pieces = text.split(b"<|end|>")
    ids = [i for piece in pieces for i in (*(token_of_byte[byte] for byte in piece), 257)][:-1]
    costs: list[int] = []
    decode = codec.decode

    def counted(token_ids: Sequence[int]) -> str:
        costs.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(codec, "decode", counted)
    decoder = IncrementalDecoder(codec)
    for _ in range(100):
        decoder.append(ids)
    assert max(costs) <= 24
    assert len(costs) <= 3 * 100 * len(ids)
    assert decoder.finish() == decode(ids * 100)


def test_bytes_that_stand_for_themselves_and_leading_spaces_come_out_right() -> None:
    """Vocabularies with byte tokens: an unfinished run of them is all replacement characters."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "▁a": 257, "b": 258, "<|end|>": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<|end|>"])
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    for ids in (
        [256, 257, *"🙂é".encode(), 258, 257],
        [259, 256, 259, 259, 256, 257],
        [257, *(b"\xff" * 40), 258, *"🙂".encode(), 257],
        [258, 259, 257, 256, 256, 258],
    ):
        decoder = IncrementalDecoder(codec)
        for i in ids:
            decoder.append([i])
        assert decoder.finish() == codec.decode(ids)
