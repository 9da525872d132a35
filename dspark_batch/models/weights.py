"""Reads the weights of a checkpoint: safetensors only, every tensor accounted for by name and shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspark_batch.errors import ModelError
from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.linear import Linear

_SHOWN = 5
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. qkv: H -> (Hq + 2 Hkv) * D; gate_up: H -> 2I; q_norm, k_norm: [D] or None."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """embedding: [V, H]; head: H -> V."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Linear


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this kind holds."""
    h, i, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, h), "model.norm.weight": (h,)}
    if not spec.tied_head:
        shapes[_HEAD] = (spec.vocab_size, h)
    projections = {
        "self_attn.q_proj": (q, h, spec.qkv_bias),
        "self_attn.k_proj": (kv, h, spec.qkv_bias),
        "self_attn.v_proj": (kv, h, spec.qkv_bias),
        "self_attn.o_proj": (h, q, spec.output_bias),
        "mlp.gate_proj": (i, h, spec.mlp_bias),
        "mlp.up_proj": (i, h, spec.mlp_bias),
        "mlp.down_proj": (h, i, spec.mlp_bias),
    }
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (h,)
        for name in ("self_attn.q_norm", "self_attn.k_norm") if spec.qk_norm else ():
            shapes[f"{prefix}{name}.weight"] = (d,)
    return shapes


def load_weights(folder: Path, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Read, convert and fuse the weights under ``folder``, one layer at a time.

    Raises:
        ModelError: no safetensors, or a missing, unexpected or mis-shaped tensor; the message names it.
    """
    with ExitStack() as stack:
        source = _Checkpoint(folder, stack)
        source.check(expected_shapes(spec), may_ignore_head=spec.tied_head)
        build = _Builder(source, dtype, device)
        embedding = build.tensor("model.embed_tokens.weight")
        layers = tuple(build.layer(f"model.layers.{i}.", spec) for i in range(spec.num_layers))
        head = Linear(embedding if spec.tied_head else build.tensor(_HEAD))
        return DecoderWeights(embedding, layers, build.tensor("model.norm.weight"), head)


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint by name, as they are stored, on the CPU.

    Raises:
        ModelError: the files cannot be read, or lack one of them.
    """
    with ExitStack() as stack:
        source = _Checkpoint(folder, stack)
        return {name: source.tensor(name) for name in names}


class TensorSource(Protocol):
    """Named tensors, read on demand."""

    def tensor(self, name: str) -> Tensor: ...


class _Builder:
    def __init__(self, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._dtype, self._device = source, dtype, device

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(name).to(device=self._device, dtype=self._dtype)

    def linear(self, names: Iterable[str], *, bias: bool) -> Linear:
        names = list(names)
        weight = torch.cat([self.tensor(f"{name}.weight") for name in names])
        return Linear(weight, torch.cat([self.tensor(f"{name}.bias") for name in names]) if bias else None)

    def layer(self, prefix: str, spec: DecoderSpec) -> LayerWeights:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self.linear((f"{attention}{x}_proj" for x in "qkv"), bias=spec.qkv_bias),
            output=self.linear([f"{attention}o_proj"], bias=spec.output_bias),
            q_norm=self.tensor(f"{attention}q_norm.weight") if spec.qk_norm else None,
            k_norm=self.tensor(f"{attention}k_norm.weight") if spec.qk_norm else None,
            mlp_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear([f"{mlp}gate_proj", f"{mlp}up_proj"], bias=spec.mlp_bias),
            down=self.linear([f"{mlp}down_proj"], bias=spec.mlp_bias),
        )


class _Checkpoint:
    """The safetensors files of a folder as one namespace."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._file_of: dict[str, Any] = {}
        for file in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} cannot be read as safetensors: {error}; fetch it again") from error
            self._file_of |= dict.fromkeys(handle.keys(), handle)

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ModelError(f"the checkpoint in {self._folder} has no tensor {name}; fetch it again")
        value: Tensor = self._file_of[name].get_tensor(name)
        return value

    def check(self, expected: Mapping[str, tuple[int, ...]], *, may_ignore_head: bool) -> None:
        found = {name for name in self._file_of if not name.endswith("rotary_emb.inv_freq")}
        if may_ignore_head:
            found.discard(_HEAD)
        missing, unexpected = sorted(expected.keys() - found), sorted(found - expected.keys())
        shapes = {name: tuple(self._file_of[name].get_slice(name).get_shape()) for name in expected.keys() & found}
        wrong = [
            f"{name} is {list(shapes[name])}, not {list(expected[name])}"
            for name in sorted(shapes)
            if shapes[name] != expected[name]
        ]
        problems = [
            f"{label}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise ModelError(
                f"the tensors in {self._folder} do not fit its config.json ({'; '.join(problems)}); "
                "the checkpoint is incomplete or uses a feature that the decoder does not have"
            )


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"{folder} has neither {single.name} nor {index.name}; only safetensors are read, never pickled weights"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}; fetch the checkpoint again") from error
    files = [folder / Path(name).name for name in names]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder} lacks the shard {file.name} that {index.name} lists; fetch it again")
    return files
