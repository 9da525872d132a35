"""The one-call decoder against the torch decoder and against itself, on random models of co-prime sizes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dspark_batch.models.attention import select_backend
from dspark_batch.models.attention.base import AttentionContext
from dspark_batch.models.attention.native import NativeAttention
from dspark_batch.models.decoder import Decoder
from dspark_batch.models.families import DecoderSpec, decoder_spec
from dspark_batch.models.kernels.library import Kernels
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.models.linear import Linear
from dspark_batch.models.native import NativeDecoder
from dspark_batch.models.ops import TorchOps
from dspark_batch.models.rope import RopeTable, rope_table
from dspark_batch.models.weights import DecoderWeights, LayerWeights
from dspark_batch.tensors import ForwardBatch, ForwardOutput, RowSlice

CPU = torch.device("cpu")
RMS_TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-5}
"""Of the difference, in units of the values' own RMS."""
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 700,
}
VARIANTS = {
    "llama": {"model_type": "llama"},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "head-norms": {"model_type": "qwen3"},
    "windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
}


@dataclass
class Model:
    spec: DecoderSpec
    rope: RopeTable
    dtype: torch.dtype

    def weights(self) -> DecoderWeights:
        """The same random weights at every call: a native decoder repacks those it is given."""
        spec, generator = self.spec, torch.Generator().manual_seed(1)
        hidden, inner, q = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
        kv = spec.num_kv_heads * spec.head_dim

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(self.dtype)

        def norm(width: int) -> Tensor:
            return (torch.rand(width, generator=generator) + 0.5).to(self.dtype)

        def linear(rows: int, columns: int, *, bias: bool) -> Linear:
            return Linear(draw(rows, columns), draw(rows) if bias else None)

        def layer() -> LayerWeights:
            return LayerWeights(
                input_norm=norm(hidden),
                qkv=linear(q + 2 * kv, hidden, bias=spec.qkv_bias),
                output=linear(hidden, q, bias=spec.output_bias),
                q_norm=norm(spec.head_dim) if spec.qk_norm else None,
                k_norm=norm(spec.head_dim) if spec.qk_norm else None,
                mlp_norm=norm(hidden),
                gate_up=linear(2 * inner, hidden, bias=spec.mlp_bias),
                down=linear(hidden, inner, bias=spec.mlp_bias),
            )

        layers = tuple(layer() for _ in range(spec.num_layers))
        embedding = draw(spec.vocab_size, hidden)
        return DecoderWeights(embedding, layers, norm(hidden), Linear(embedding))

    def cache(self) -> KVCache:
        spec = self.spec
        return KVCache(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_tokens=2500,
            dtype=self.dtype,
            device=CPU,
        )

    def native(self, kernels: Kernels, kv: KVCache) -> NativeDecoder:
        return NativeDecoder(self.spec, weights=self.weights(), kv=kv, rope=self.rope, kernels=kernels)

    def torch_decoder(self, kv: KVCache, kernels: Kernels | None = None) -> Decoder:
        weights = self.weights()
        q = [layer.q_norm for layer in weights.layers if layer.q_norm is not None]
        k = [layer.k_norm for layer in weights.layers if layer.k_norm is not None]
        context = AttentionContext(spec=self.spec, kv=kv, rope=self.rope, q_norms=q or None, k_norms=k or None)
        backend = NativeAttention(context, kernels) if kernels else select_backend(context, name="reference")
        return Decoder(self.spec, weights=weights, attention=backend, ops=TorchOps())


def model(variant: str, dtype: torch.dtype) -> Model:
    spec = decoder_spec({**CONFIG, **VARIANTS[variant]})
    rope = rope_table(spec.rope, head_dim=spec.head_dim, num_positions=700, dtype=dtype, device=CPU)
    return Model(spec, rope, dtype)


def batch(rows: list[tuple[int, int, int]], *, taps: tuple[int, ...] = (), every: int = 1) -> ForwardBatch:
    """rows: (slot, kv_len, num_tokens). A token's id follows from its slot and position."""
    ids = [(slot * 31 + p * 7) % 97 for slot, kv_len, n in rows for p in range(kv_len, kv_len + n)]
    index = torch.arange(len(ids))[every - 1 :: every]
    return ForwardBatch(torch.tensor(ids), tuple(RowSlice(*row) for row in rows), index, taps)


def steps(decoder: Decoder | NativeDecoder, kv: KVCache, *, taps: tuple[int, ...]) -> list[ForwardOutput]:
    slots = [kv.allocate(n) for n in (300, 41, 67)]
    a, b, c = (slot for slot in slots if slot is not None)
    kv.poison(a, 0)
    kv.poison(b, 0)
    first = decoder.forward(batch([(a, 0, 277), (b, 0, 5)], taps=taps, every=5))
    second = decoder.forward(batch([(b, 5, 1), (c, 0, 37), (a, 277, 3)], taps=taps))
    return [first, second]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    assert error < RMS_TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("taps", [(), (1, -1), (0, 2)])
def test_the_native_decoder_equals_the_torch_decoder(
    kernels: Kernels, dtype: torch.dtype, variant: str, taps: tuple[int, ...]
) -> None:
    made = model(variant, dtype)
    kv, plain_kv = made.cache(), made.cache()
    got, want = steps(made.native(kernels, kv), kv, taps=taps), steps(made.torch_decoder(plain_kv), plain_kv, taps=taps)
    for ours, theirs in zip(got, want, strict=True):
        close(ours.hidden, theirs.hidden, dtype)
        assert (ours.features is None) == (theirs.features is None)
        if ours.features is not None and theirs.features is not None:
            close(ours.features, theirs.features, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_torch_decoder_runs_on_the_native_attention(kernels: Kernels, dtype: torch.dtype, variant: str) -> None:
    made = model(variant, dtype)
    kv, plain_kv = made.cache(), made.cache()
    got = steps(made.torch_decoder(kv, kernels), kv, taps=())
    for ours, theirs in zip(got, steps(made.torch_decoder(plain_kv), plain_kv, taps=()), strict=True):
        close(ours.hidden, theirs.hidden, dtype)


def test_logits_are_products_with_the_head(kernels: Kernels, dtype: torch.dtype) -> None:
    made = model("llama", dtype)
    decoder = made.native(kernels, made.cache())
    hidden = torch.randn(7, 48).to(dtype)
    want = hidden.double() @ made.weights().embedding.double().T
    torch.testing.assert_close(decoder.logits(hidden).double(), want, rtol=1e-4, atol=1e-4)
    assert decoder.logits(hidden).dtype == torch.float32


@pytest.mark.parametrize("variant", ["head-norms", "windows"])
def test_no_bit_depends_on_company_slices_sharing_or_threads(
    kernels: Kernels, dtype: torch.dtype, variant: str
) -> None:
    """Row by row in one slice on one thread, against everything at once in random slices with a shared prefix."""
    made, rng, prefix_len, ends = model(variant, dtype), random.Random(3), 269, (300, 283, 311)
    kv = made.cache()
    decoder = made.native(kernels, kv)
    ids = torch.randint(0, 97, (700,), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = []
    for row, end in enumerate(ends):
        slot = kv.allocate(400)
        assert slot is not None
        tokens = torch.cat((ids[:prefix_len], ids[prefix_len + row : end + row]))
        want.append(decoder.forward(ForwardBatch(tokens, (RowSlice(slot, 0, end),), torch.arange(end))).hidden)
        kv.free(slot)
    torch.set_num_threads(2)
    prefix = kv.allocate(prefix_len)
    assert prefix is not None
    decoder.forward(ForwardBatch(ids[:prefix_len], (RowSlice(prefix, 0, prefix_len),), torch.tensor([0])))
    slots = [kv.allocate(60, prefix=prefix, prefix_len=prefix_len) for _ in ends]
    at = [prefix_len] * len(ends)
    while any(a < end for a, end in zip(at, ends, strict=True)):
        parts, tokens, checks = [], [], []
        for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
            n = min(rng.choice((1, 1, 3, 18)), end - at[row])
            if n and slot is not None:
                parts.append(RowSlice(slot, at[row], n))
                tokens.append(ids[at[row] + row : at[row] + row + n])
                checks.append(want[row][at[row] : at[row] + n])
                at[row] += n
        flat = torch.cat(tokens)
        out = decoder.forward(ForwardBatch(flat, tuple(parts), torch.arange(len(flat))))
        assert torch.equal(out.hidden, torch.cat(checks))
    torch.set_num_threads(before)
