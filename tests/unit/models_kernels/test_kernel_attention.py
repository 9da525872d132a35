from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dspark_batch.models.kernels.library import AttentionPlan, AttentionShape, Kernels, attend

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """rows: (num_tokens, kv_len, own_start, prefix_start, prefix_len)."""

    rows: tuple[tuple[int, int, int, int, int], ...]
    cache_tokens: int
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    window: int | None = None
    head_norms: bool = False
    is_causal: bool = True

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def num_tokens(self) -> int:
        return sum(row[0] for row in self.rows)


@dataclass
class Tensors:
    qkv: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def cache_index(row: tuple[int, int, int, int, int], position: int) -> int:
    _, _, own, prefix, prefix_len = row
    return prefix + position if position < prefix_len else own + position - prefix_len


def tensors(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Tensors:
    """Random input; every cache entry that no row may read is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shape = (case.num_kv_heads, case.cache_tokens, case.head_dim)
    live = torch.zeros(case.cache_tokens, dtype=torch.bool)
    for row in case.rows:
        for position in range(row[1]):
            live[cache_index(row, position)] = True
    k, v = (draw(*shape).masked_fill(~live[None, :, None], float("nan")) for _ in range(2))
    angle = torch.rand(4096, case.head_dim // 2, generator=generator) * 6.28
    norms = [draw(case.head_dim) if case.head_norms else None for _ in range(2)]
    qkv = draw(case.num_tokens, (case.num_q_heads + 2 * case.num_kv_heads) * case.head_dim) * 2
    return Tensors(qkv, k, v, angle.cos(), angle.sin(), *norms)


def run(kernels: Kernels, case: Case, given: Tensors) -> Tensor:
    """The kernel on copies of qkv; writes the cache in place."""
    shape = AttentionShape(
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        cache_tokens=case.cache_tokens,
        norm_eps=1e-5,
        is_causal=case.is_causal,
    )
    plan = AttentionPlan(kernels, case.rows, shape, window=case.window)
    out = torch.full((case.num_tokens, case.num_q_heads * case.head_dim), float("nan"), dtype=given.qkv.dtype)
    attend(
        kernels,
        plan,
        given.qkv.clone(),
        cos=given.cos,
        sin=given.sin,
        k=given.k,
        v=given.v,
        out=out,
        q_norm=given.q_norm,
        k_norm=given.k_norm,
    )
    return out


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    y = x.double()
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    return y * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.double().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def oracle(case: Case, given: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token in float64: output, and the keys and values of the cache after the step."""
    k, v = given.k.clone(), given.v.clone()
    heads = given.qkv.view(case.num_tokens, -1, case.head_dim)
    out = torch.zeros(case.num_tokens, case.num_q_heads, case.head_dim, dtype=torch.float64)
    flat = 0
    for row in case.rows:
        for position, new in enumerate(heads[flat : flat + row[0]], start=row[1]):
            cos, sin = given.cos[position].double(), given.sin[position].double()
            new_k = new[case.num_q_heads : case.num_q_heads + case.num_kv_heads]
            k[:, cache_index(row, position)] = rotated(normed(new_k, given.k_norm), cos, sin)
            v[:, cache_index(row, position)] = new[case.num_q_heads + case.num_kv_heads :]
        for j in range(row[0]):
            position = row[1] + j
            cos, sin = given.cos[position].double(), given.sin[position].double()
            q = rotated(normed(heads[flat, : case.num_q_heads], given.q_norm), cos, sin)
            first = max(0, position + 1 - case.window) if case.window else 0
            seen = [cache_index(row, p) for p in range(first, position + 1 if case.is_causal else row[1] + row[0])]
            grouped = q.double().view(case.num_kv_heads, case.group, case.head_dim)
            scores = grouped @ k[:, seen].double().transpose(1, 2) * case.head_dim**-0.5
            out[flat] = (scores.softmax(dim=-1) @ v[:, seen].double()).flatten(0, 1)
            flat += 1
    return out.flatten(1), k, v


def check(kernels: Kernels, case: Case, dtype: torch.dtype, *, seed: int = 0) -> None:
    given = tensors(case, dtype, seed=seed)
    want, want_k, want_v = oracle(case, given)
    got = run(kernels, case, given)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(given.k, want_k, rtol=1e-2, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(given.v, want_v, rtol=0, atol=0, equal_nan=True)


Rows = tuple[tuple[int, int, int, int, int], ...]


def ragged(lengths: tuple[tuple[int, int], ...], *, seed: int = 0) -> tuple[Rows, int]:
    """Rows of (num_tokens, kv_len) at shuffled, gapped places of a cache, and the size of that cache."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    start, at = {}, 5
    for i in order:
        start[i], at = at, at + sum(lengths[i]) + 3
    return tuple((n, kv, start[i], 0, 0) for i, (n, kv) in enumerate(lengths)), at


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("head_dim", "group"), [(16, 7), (32, 1), (64, 3), (80, 2), (96, 4), (128, 4), (256, 1)])
def test_decode_and_verify_slices_equal_the_oracle_for_every_head_shape(
    kernels: Kernels, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    rows, size = ragged(((1, 31), (5, 0), (1, 0), (3, 257), (2, 17)))
    check(kernels, Case(rows, size, head_dim=head_dim, group=group), dtype)


@pytest.mark.parametrize("window", [1, 19, 300])
def test_a_window_hides_older_positions(kernels: Kernels, dtype: torch.dtype, window: int) -> None:
    rows, size = ragged(((1, 31), (5, 509), (37, 0), (1, 1)))
    check(kernels, Case(rows, size, window=window, num_kv_heads=1), dtype)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 32)])
def test_slices_that_see_all_of_themselves_equal_the_oracle(
    kernels: Kernels, dtype: torch.dtype, group: int, head_dim: int
) -> None:
    rows, size = ragged(((4, 31), (4, 0), (7, 253), (16, 249), (1, 256), (45, 230), (300, 0)))
    check(kernels, Case(rows, size, num_kv_heads=1, group=group, head_dim=head_dim, is_causal=False), dtype)


def test_head_norms_come_before_the_rotation(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, size = ragged(((1, 31), (5, 7)))
    check(kernels, Case(rows, size, head_norms=True), dtype)


def test_prefill_slices_over_several_tiles_and_chunks_equal_the_oracle(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, size = ragged(((67, 0), (101, 211), (17, 523)))
    check(kernels, Case(rows, size, num_kv_heads=1, group=2, head_dim=32), dtype)


def shared_rows(prefix_len: int, lengths: tuple[tuple[int, int], ...]) -> tuple[Rows, int]:
    """Rows of (num_tokens, own tokens so far) after one prefix at token 7 of the cache."""
    rows, at = [], 7 + prefix_len + 2
    for n, own in lengths:
        rows.append((n, prefix_len + own, at, 7, prefix_len))
        at += n + own + 2
    return tuple(rows), at


@pytest.mark.parametrize("window", [None, 400])
@pytest.mark.parametrize("prefix_len", [3, 256, 601])
def test_rows_that_share_a_prefix_equal_the_oracle(
    kernels: Kernels, dtype: torch.dtype, prefix_len: int, window: int | None
) -> None:
    rows, size = shared_rows(prefix_len, ((1, 0), (4, 13), (1, 290), (19, 5), (2, 1)))
    check(kernels, Case(rows, size, num_kv_heads=1, head_dim=32, window=window), dtype)


def test_sharing_a_prefix_changes_no_bit(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, size = shared_rows(601, ((1, 0), (4, 13), (1, 290), (2, 1)))
    shared = Case(rows, size)
    given = tensors(shared, dtype)
    copies, at, index = [], 0, []
    for row in rows:
        copies.append((row[0], row[1], at, 0, 0))
        index += [cache_index(row, p) for p in range(row[1] + row[0])]
        at += row[1] + row[0]
    alone = Tensors(
        given.qkv, given.k[:, index].contiguous(), given.v[:, index].contiguous(), given.cos, given.sin, None, None
    )
    assert torch.equal(run(kernels, shared, given), run(kernels, Case(tuple(copies), at), alone))


def test_no_bit_depends_on_threads_or_on_the_other_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, size = ragged(((1, 31), (5, 509), (37, 300), (1, 1), (3, 258)))
    case = Case(rows, size)
    given = tensors(case, dtype)
    with threads(1):
        one = run(kernels, case, given)
    with threads(2):
        assert torch.equal(run(kernels, case, given), one)
    first = 0
    for row in rows:
        part = Tensors(**{**vars(given), "qkv": given.qkv[first : first + row[0]].contiguous()})
        assert torch.equal(run(kernels, Case((row,), size), part), one[first : first + row[0]])
        first += row[0]


def test_no_bit_depends_on_how_a_row_is_cut_into_slices(kernels: Kernels, dtype: torch.dtype) -> None:
    whole = Case(((300, 0, 2, 0, 0),), 310)
    given = tensors(whole, dtype)
    want = run(kernels, whole, given)
    cut = tensors(whole, dtype)
    first, got = 0, []
    for n in (1, 255, 17, 3, 23, 1):
        part = Tensors(**{**vars(cut), "qkv": cut.qkv[first : first + n].contiguous()})
        got.append(run(kernels, Case(((n, first, 2, 0, 0),), 310), part))
        first += n
    assert first == 300
    assert torch.equal(torch.cat(got), want)
    assert torch.equal(cut.k.nan_to_num(), given.k.nan_to_num())


def test_random_ragged_batches_equal_the_oracle(kernels: Kernels, dtype: torch.dtype) -> None:
    rng = random.Random(11)
    for seed in range(6):
        lengths = tuple((rng.choice((1, 1, 2, 5, 19)), rng.choice((0, 1, 13, 127, 256, 263))) for _ in range(7))
        rows, size = ragged(lengths, seed=seed)
        check(
            kernels,
            Case(rows, size, num_kv_heads=rng.choice((1, 2)), group=rng.choice((1, 2, 5)), head_dim=16),
            dtype,
            seed=seed,
        )
