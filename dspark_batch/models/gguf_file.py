"""Reads a llama GGUF file: expands its quantised blocks and gives tensors the names and layout of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_batch.errors import UnsupportedModelError

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def checkpoint_tensors(
    file: Path, *, num_heads: int, num_kv_heads: int
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Each tensor of ``file`` as (checkpoint name, float32 array).

    GGUF stores the two halves of a rotated head interleaved; queries and keys are put back here.

    Raises:
        UnsupportedModelError: a tensor that a llama checkpoint does not have.
    """
    import gguf

    for tensor in gguf.GGUFReader(file).tensors:
        name = _checkpoint_name(tensor.name)
        if name is None:
            raise UnsupportedModelError(f"{file}: tensor {tensor.name!r} has no counterpart in a llama checkpoint")
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _halves_apart(values, num_heads if "q_proj" in name else num_kv_heads)
        yield name, np.array(values, order="C")


def _checkpoint_name(gguf_name: str) -> str | None:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return None


def _halves_apart(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """[heads * D, in], rows of a head interleaved as (0, D/2, 1, D/2 + 1, ...) -> the natural order."""
    pairs = values.reshape(num_heads, -1, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)
