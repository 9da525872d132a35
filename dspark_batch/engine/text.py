"""Between text and tokens: prompts in, stop strings and text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from dspark_batch.core import ErrorCode, Message, Request, RowError
from dspark_batch.models.text import IncrementalDecoder, TextCodec


class Codec(Protocol):
    """The checkpoint's tokenizer and chat template."""

    @property
    def has_chat_template(self) -> bool: ...

    def tokenizer_json(self) -> str | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_plain(self, text: str) -> list[int]: ...

    def encode_chat(
        self, messages: Sequence[Message], *, arguments: Mapping[str, object] | None = None
    ) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


def prompt_tokens(request: Request, codec: Codec | None) -> list[int] | RowError:
    """The request's prompt as token ids, or why there is none. Does not check their range or number."""
    if request.prompt_token_ids is not None:
        return list(request.prompt_token_ids)
    if codec is None:
        return RowError(
            code=ErrorCode.UNDECODABLE_TEXT,
            message=f"request {request.id!r} has text, but the target has no tokenizer; give prompt_token_ids",
        )
    texts = [request.prompt] if request.prompt is not None else [m.content for m in request.messages or ()]
    try:
        for text in texts:
            (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        return RowError(
            code=ErrorCode.UNDECODABLE_TEXT, message=f"the prompt of {request.id!r} is not Unicode: {error}"
        )
    if request.prompt is not None:
        return codec.encode(request.prompt)
    if not request.messages:
        return RowError(code=ErrorCode.EMPTY_PROMPT, message=f"request {request.id!r} has no messages")
    if not codec.has_chat_template:
        return RowError(
            code=ErrorCode.TEMPLATE_ERROR,
            message=f"request {request.id!r} has messages, but the target has no chat template; give raw text",
        )
    try:
        return codec.encode_chat(request.messages, arguments=request.chat_template_arguments)
    except Exception as error:  # A template is a program of the checkpoint's author and can raise anything.
        message = f"the chat template failed on {request.id!r}: {error}"
        if request.chat_template_arguments:
            names = ", ".join(request.chat_template_arguments)
            message += f"; prompt.chat_template_arguments are set ({names}) and may be the cause"
        return RowError(code=ErrorCode.TEMPLATE_ERROR, message=message)


class StopStrings:
    """Looks for stop strings in the text of one growing output."""

    def __init__(self, stop: Sequence[str], codec: Codec) -> None:
        self._stop = stop
        self._reach = max(len(s) for s in stop) - 1
        # It uses nothing but ``decode``.
        self._decoder = IncrementalDecoder(cast(TextCodec, codec))
        self._text = ""

    def push(self, token_id: int) -> str | None:
        """The text before the earliest stop string that this token completed; None when there is none."""
        piece = self._decoder.append((token_id,))
        if not piece:
            return None
        start = max(0, len(self._text) - self._reach)
        self._text += piece
        found = [at for at in (self._text.find(s, start) for s in self._stop) if at >= 0]
        return self._text[: min(found)] if found else None
