"""Text to token ids and back, by the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_batch.core import Message
from dspark_batch.errors import ModelError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_INCOMPLETE = "�"
_MOST_OPEN = 3
"""So many replacement characters at the end of a text may still become a character, whose fourth byte is missing."""

_MOST_UNSETTLED = 12
"""After so many tokens what precedes that end is settled: they reach further back than it, at three bytes for each."""


class TextCodec:
    """Wraps the tokenizer of one checkpoint; code from the checkpoint is never run."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec | None:
        """The codec of a checkpoint folder, or None where it has no tokenizer files.

        Raises:
            ModelError: the tokenizer files are there but cannot be loaded.
        """
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def num_tokens(self) -> int:
        """Size of the tokenizer's vocabulary, special tokens included."""
        return len(self._tokenizer)

    def tokenizer_json(self) -> str | None:
        """The tokenizer as ``tokenizer.json`` holds it; None for those that are not of this kind."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        text: str = backend.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt, with the special tokens that the tokenizer adds to one."""
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation by the chat template, to which ``arguments`` are variables of their own.

        Raises:
            ModelError: the checkpoint has no chat template.
            ValueError: the template refuses these messages (for instance, roles out of order).
        """
        if not self.has_chat_template:
            raise ModelError("the checkpoint has no chat template; give raw prompts or token ids instead of messages")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **(arguments or {})
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


class IncrementalDecoder:
    """Text of a growing list of tokens at a cost per token that does not grow with the list.

    Only a window of tokens is decoded: those since the last settled point, and those that were settled there (a
    tokenizer may write a leading space differently at the start of a text). Text that ends inside a multi-byte
    character is held back until the character is complete, or cannot be any more.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._num_new = 0
        self._num_shown = 0
        self._text = ""

    @property
    def text(self) -> str:
        """The text so far that later tokens cannot change."""
        return self._text

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that became stable by them (maybe empty)."""
        before = len(self._text)
        for token_id in token_ids:
            self._push(token_id)
        return self._text[before:]

    def finish(self) -> str:
        """The whole text, with replacement characters where the last character is incomplete."""
        self._show(self._codec.decode(self._window), num_open=0)
        return self._text

    def _push(self, token_id: int) -> None:
        self._window.append(token_id)
        self._num_new += 1
        text = self._codec.decode(self._window)
        num_open = len(text[-_MOST_OPEN:]) - len(text[-_MOST_OPEN:].rstrip(_INCOMPLETE))
        if num_open or len(text) <= self._num_shown:
            if self._is_skipped(token_id):
                self._window.pop()
                self._num_new -= 1
                return
            if self._num_new < _MOST_UNSETTLED:
                return
        self._show(text, num_open=num_open)

    def _show(self, text: str, *, num_open: int) -> None:
        """Settle ``text``, that of the window, but for its last ``num_open`` characters; the window shrinks."""
        self._text += text[self._num_shown : len(text) - num_open]
        self._window = self._window[len(self._window) - self._num_new :]
        self._num_shown = len(self._codec.decode(self._window)) - num_open
        self._num_new = 0

    def _is_skipped(self, token_id: int) -> bool:
        """Whether decoding leaves the token out. A space alone is left out too where a text begins, but not three."""
        return not self._codec.decode([token_id] * 3)
