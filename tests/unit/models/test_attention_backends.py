"""Every attention backend against the slow oracle, on random ragged rows of co-prime lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.models.attention import BACKENDS, select_backend
from dspark_batch.models.attention.base import AttentionContext
from dspark_batch.models.families import DecoderSpec, decoder_spec
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.models.rope import rope_table
from dspark_batch.tensors import ForwardBatch, RowSlice

FAST = [name for name in BACKENDS if name != "reference"]
HEAD_DIMS = {"native": (16, 32, 80)}
"""The native kernels only know multiples of their vector width."""
PRIMES = (2, 3, 5, 7, 11, 13, 17, 23, 29, 37)
CPU = torch.device("cpu")


def need(backend: str) -> None:
    if backend == "native" and load_kernels() is None:
        pytest.skip("no compiled kernels here")


def make_spec(*, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> DecoderSpec:
    config = {
        "model_type": "mistral",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "sliding_window": window,
    }
    return decoder_spec(config)


class Scene:
    """Rows with a random past in a pool whose dead places are NaN; the same for every backend."""

    def __init__(
        self, spec: DecoderSpec, rows: list[tuple[int, int]], *, shared: int | None = None, dtype: torch.dtype
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.kv = KVCache(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_tokens=1024,
            dtype=dtype,
            device=CPU,
        )
        self.kv.k.fill_(float("nan"))
        self.kv.v.fill_(float("nan"))
        generator = torch.Generator().manual_seed(len(rows) + sum(n for _, n in rows))
        prefix = None
        if shared is not None:
            prefix = self._reserve(shared, 0)
            self._fill(prefix, shared, generator)
        slices = []
        for index, (kv_len, n) in enumerate(rows):
            self.kv.allocate(1 + index)
            if prefix is not None and shared is not None and index % 2 == 0 and kv_len >= shared:
                slot = self._reserve(kv_len + n - shared, shared, prefix)
            else:
                slot = self._reserve(kv_len + n + 3, 0)
            self._fill(slot, kv_len, generator)
            slices.append(RowSlice(slot, kv_len, n))
        num_tokens = sum(n for _, n in rows)
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self.qkv = torch.randn(spec.num_layers, num_tokens, width, generator=generator).to(dtype)
        none = torch.empty(0, dtype=torch.int64)
        self.batch = ForwardBatch(torch.zeros(num_tokens, dtype=torch.int64), tuple(slices), none)
        self._before = self.kv.k.clone(), self.kv.v.clone()

    def run(self, backend: str, *, head_norms: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs of all layers, then the pool's keys and values."""
        spec = self.spec
        self.kv.k.copy_(self._before[0])
        self.kv.v.copy_(self._before[1])
        rope = rope_table(spec.rope, head_dim=spec.head_dim, num_positions=512, dtype=self.dtype, device=CPU)
        norms = [torch.linspace(0.5, 1.5, spec.head_dim).to(self.dtype)] * spec.num_layers if head_norms else None
        context = AttentionContext(spec=spec, kv=self.kv, rope=rope, q_norms=norms, k_norms=norms)
        attention = select_backend(context, name=backend)
        plan = attention.plan(self.batch)
        outputs = [attention.attend(layer, self.qkv[layer].clone(), plan) for layer in range(spec.num_layers)]
        return torch.stack(outputs), self.kv.k.clone(), self.kv.v.clone()

    def _reserve(self, num_tokens: int, prefix_len: int, prefix: int | None = None) -> int:
        slot = self.kv.allocate(num_tokens, prefix=prefix, prefix_len=prefix_len)
        assert slot is not None
        return slot

    def _fill(self, slot: int, kv_len: int, generator: torch.Generator) -> None:
        extent = self.kv.extent(slot)
        live = slice(extent.start, extent.start + kv_len - extent.prefix_len)
        for pool in (self.kv.k, self.kv.v):
            pool[:, :, live] = torch.randn(pool[:, :, live].shape, generator=generator).to(self.dtype)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from((0, *PRIMES)), st.sampled_from((1, 1, 1, *PRIMES))), min_size=1, max_size=7
    ),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4), (9, 3)]),
    size=st.integers(0, 2),
    window=st.sampled_from([None, 1, 7, 31]),
    shared=st.sampled_from([None, 3, 11]),
    head_norms=st.booleans(),
)
def test_every_backend_agrees_with_the_oracle(
    backend: str,
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    window: int | None,
    shared: int | None,
    head_norms: bool,
) -> None:
    need(backend)
    head_dim = HEAD_DIMS.get(backend, (2, 8, 20))[size]
    spec = make_spec(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, window=window)
    scene = Scene(spec, rows, shared=shared, dtype=torch.float32)
    expected = scene.run("reference", head_norms=head_norms)
    got = scene.run(backend, head_norms=head_norms)
    assert expected[0].isfinite().all()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_agrees_with_the_oracle_within_its_rounding(backend: str) -> None:
    need(backend)
    spec = make_spec(num_heads=9, num_kv_heads=3, head_dim=64, window=None)
    scene = Scene(spec, [(37, 1), (101, 5), (0, 89), (13, 23)], dtype=torch.bfloat16)
    expected, got = scene.run("reference")[0], scene.run(backend)[0]
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prompt_chunk_agrees_with_feeding_it_whole(backend: str) -> None:
    need(backend)
    spec = make_spec(num_heads=2, num_kv_heads=1, head_dim=16, window=None)
    scene = Scene(spec, [(0, 97)], dtype=torch.float32)
    whole = scene.run(backend)[0]
    slot = scene.batch.slices[0].slot
    first = ForwardBatch(scene.batch.token_ids[:41], (RowSlice(slot, 0, 41),), scene.batch.logit_index)
    second = ForwardBatch(scene.batch.token_ids[41:], (RowSlice(slot, 41, 56),), scene.batch.logit_index)
    full_qkv, parts = scene.qkv, []
    for batch, tokens in ((first, slice(0, 41)), (second, slice(41, 97))):
        scene.batch, scene.qkv = batch, full_qkv[:, tokens]
        parts.append(scene.run(backend)[0])
        scene._before = scene.kv.k.clone(), scene.kv.v.clone()
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_slice_that_does_not_fit_its_slot_is_refused() -> None:
    spec = make_spec(num_heads=1, num_kv_heads=1, head_dim=2, window=None)
    scene = Scene(spec, [(3, 2)], dtype=torch.float32)
    scene.batch = ForwardBatch(torch.zeros(9, dtype=torch.int64), (RowSlice(1, 3, 9),), scene.batch.logit_index)
    with pytest.raises(AssertionError, match="does not fit its slot"):
        scene.run("cpu")


def test_writing_into_a_shared_prefix_is_refused() -> None:
    spec = make_spec(num_heads=1, num_kv_heads=1, head_dim=2, window=None)
    scene = Scene(spec, [(3, 2)], shared=3, dtype=torch.float32)
    row = scene.batch.slices[0]
    early = RowSlice(row.slot, 2, 2)
    scene.batch = ForwardBatch(scene.batch.token_ids, (early,), scene.batch.logit_index)
    with pytest.raises(AssertionError, match="shared prefix"):
        scene.run("cpu")


def test_an_unknown_backend_is_refused_by_name() -> None:
    spec = make_spec(num_heads=1, num_kv_heads=1, head_dim=2, window=None)
    with pytest.raises(ValueError, match=r"'flash9'.*known are reference"):
        Scene(spec, [(0, 1)], dtype=torch.float32).run("flash9")
