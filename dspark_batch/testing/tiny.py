"""Tiny random checkpoints of every supported family, for tests that must not need real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dspark_batch.models.loader import LoadedTarget

_BASE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}
_KV_CACHE_GIB = 0.002
_SPECIAL_TOKENS = ("<|start|>", "<|end|>", "<|pad|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_tiny_checkpoint(
    path: str | Path, family: str = "llama", *, seed: int = 0, tokenizer: bool = True, **overrides: Any
) -> Path:
    """Write a random float32 checkpoint (config, safetensors, tokenizer) to the folder ``path`` and return it.

    ``overrides`` are fields of the family's config. Every parameter is random, norms and biases included, so that
    leaving one out shows. The tokenizer has one token per byte and three special ones (ids 256 to 258), and a chat
    template; ``tokenizer=False`` leaves it out.

    Raises:
        KeyError: unknown family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    settings = {**_BASE, **_FAMILY[family], **overrides}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    if tokenizer:
        _byte_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields in the checkpoint's config.json; a field set to ``...`` is removed."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(fields)
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def load_tiny(folder: Path, *, attention: str | None = None, dtype: Any = "float32") -> LoadedTarget:
    """The checkpoint on the CPU with room for a few hundred tokens of KV."""
    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.models.loader import load_target

    config = EngineConfig(target=str(folder), dtype=dtype, device="cpu", kv_cache_gib=_KV_CACHE_GIB)
    return load_target(config, attention=attention)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    start, end, pad = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad, chat_template=_CHAT_TEMPLATE
    )
