"""From the engine's settings to a target that is ready to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ModelError
from dspark_batch.models.convert import materialise
from dspark_batch.models.families import DecoderSpec, decoder_spec
from dspark_batch.models.kv_cache import KVCache, kv_pool_tokens
from dspark_batch.models.machine import usable_cpus
from dspark_batch.models.runner import TargetRunner
from dspark_batch.models.sources import resolve_source, weights_fingerprint
from dspark_batch.models.text import TextCodec
from dspark_batch.models.weights import load_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTarget:
    """A target with its text codec (None without tokenizer files), stop tokens and the fingerprint of its files."""

    target: TargetRunner
    codec: TextCodec | None
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load_target(config: EngineConfig, *, attention: str | None = None) -> LoadedTarget:
    """Find, convert if need be, check and load the target of ``config``.

    Raises:
        ModelError: the checkpoint is missing, damaged or does not fit in the memory that the config allows.
        UnsupportedModelError: the checkpoint has a feature that the decoder does not compute.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    source = resolve_source(config.target, revision=config.revision)
    folder = materialise(source)
    checkpoint = read_json(folder / "config.json")
    spec = decoder_spec(checkpoint, where=str(folder / "config.json"))
    weights = load_weights(folder, spec, dtype=dtype, device=device)
    max_context = min(spec.max_context, config.max_context or spec.max_context)
    kv = _make_cache(spec, config, max_context=max_context, dtype=dtype, device=device)
    target = TargetRunner(spec, weights=weights, kv=kv, max_context=max_context, attention=attention)
    return LoadedTarget(
        target=target,
        codec=TextCodec.from_folder(folder),
        eos_token_ids=eos_token_ids(folder, checkpoint),
        fingerprint=weights_fingerprint(source),
    )


def resolve_device(name: str) -> torch.device:
    """``auto``: the first CUDA device where there is one, else the CPU.

    Raises:
        ModelError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device is 'cuda', but no CUDA device is at hand; use 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device multiplies it in hardware, else float32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units and capabilities != "NO AVX" else torch.float32


def eos_token_ids(folder: Path, checkpoint: Mapping[str, object]) -> tuple[int, ...]:
    """End-of-sequence tokens: those of generation_config.json where it names any, else those of config.json."""
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    value = generation.get("eos_token_id")
    value = checkpoint.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ModelError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def read_json(file: Path) -> dict[str, object]:
    """The mapping in a JSON file.

    Raises:
        ModelError: the file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a mapping, got {type(value).__name__}")
    return value


def _make_cache(
    spec: DecoderSpec, config: EngineConfig, *, max_context: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    bytes_per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    useful = config.max_concurrency * max_context if isinstance(config.max_concurrency, int) else None
    # An engine with a share of the CPUs leaves room for those with the others.
    share = config.threads / usable_cpus() if isinstance(config.threads, int) else 1.0
    num_tokens = kv_pool_tokens(
        config.kv_cache_gib,
        bytes_per_token=bytes_per_token,
        device=device,
        max_useful_tokens=useful,
        machine_share=share,
    )
    if num_tokens < 2:
        raise ModelError(
            f"engine.kv_cache_gib = {config.kv_cache_gib} leaves room for {num_tokens} tokens of "
            f"{bytes_per_token} bytes each; raise it"
        )
    return KVCache(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_tokens=num_tokens,
        dtype=dtype,
        device=device,
    )
