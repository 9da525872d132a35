"""Turns an embedded quantised file into a safetensors folder, once per machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from dspark_batch.errors import ModelError
from dspark_batch.models.locks import exclusive
from dspark_batch.models.sources import CACHE_VARIABLE, ModelSource, cache_dir, weights_fingerprint

_FORMAT = 1
"""Raised when the converted folder's contents change, so that old conversions are not used."""


def materialise(source: ModelSource) -> Path:
    """The folder with ``source``'s config, safetensors and tokenizer; an embedded model is converted first if need be.

    The conversion appears whole or not at all; several processes may ask at once and one of them converts. Weights
    are stored in float32, to which the quantised blocks expand without rounding (bfloat16 would round them).

    Raises:
        ModelError: the conversion failed; the message has the cause.
    """
    if source.kind != "embedded":
        return source.path
    folder = cache_dir() / "models" / f"{source.name}-{weights_fingerprint(source)[:16]}-v{_FORMAT}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert(source.path, folder)
    except OSError as error:
        raise ModelError(
            f"the embedded model {source.name!r} could not be converted into {folder}: {error}; set "
            f"{CACHE_VARIABLE} to a writable folder with 1 GiB free"
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _write_safetensors(gguf, staging)
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    try:
        os.rename(staging, folder)
    except OSError:
        # Where nothing can be locked, another process may have been first.
        if not folder.is_dir():
            raise


def _write_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from dspark_batch.models.families import decoder_spec
    from dspark_batch.models.gguf_file import checkpoint_tensors

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    config.pop("quantization_config", None)
    spec = decoder_spec(config, where=str(gguf))
    arrays = checkpoint_tensors(gguf, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads)
    tensors = {name: torch.from_numpy(array) for name, array in arrays}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
