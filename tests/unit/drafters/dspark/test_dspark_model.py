"""The batched drafter against the one-row oracle, and against itself with other batches and other histories."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_batch.drafters.dspark import block_attention, model
from dspark_batch.drafters.dspark.block_attention import BlockAttention
from dspark_batch.drafters.dspark.checkpoint import DrafterWeights
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.context_cache import ContextCache
from dspark_batch.drafters.dspark.model import DSparkModel
from dspark_batch.drafters.dspark.reference import ReferenceDraft, reference_draft
from dspark_batch.drafters.dspark.target_parts import RunBlocks
from dspark_batch.models.draft_blocks import native_blocks
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.tensors import BlockWeights
from dspark_batch.testing.tiny_drafter import PlainParts, random_drafter, tiny_drafter_config

LENGTHS = (13, 1, 29, 7, 64, 5)
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov": "gated"},
    "rnn": {"markov": "rnn"},
    "rnn reduced": {"markov": "rnn", "draft_vocab_size": 23},
    "dflash": {"markov": None, "has_confidence": False, "sample_from_anchor": False},
    "masks with a head": {"markov": "gated", "sample_from_anchor": False},
    "plain confidence": {"confidence_with_markov": False},
    "causal windows": {"windows": (None, 6), "causal_windows": True},
    "windows": {"windows": (6, 9), "num_kv_heads": 3},
}


class Setup:
    """A random drafter, its parts, and random features of some rows."""

    def __init__(
        self, variant: str, lengths: Sequence[int] = LENGTHS, *, parts: PlainParts | None = None, **sizes: int
    ) -> None:
        self.config: DSparkConfig = tiny_drafter_config(**sizes, **VARIANTS[variant])
        self.weights: DrafterWeights = random_drafter(self.config)
        self.parts = parts or PlainParts.random()
        self.model = DSparkModel(self.weights, self.parts, where="test")
        generator = torch.Generator().manual_seed(3)
        width = self.config.hidden_size * len(self.config.taps)
        self.features = [torch.randn(n, width, generator=generator) for n in lengths]
        self.anchors = torch.randint(0, 61, (len(lengths),), generator=generator)

    def cache(self) -> ContextCache:
        """With dead memory that spoils whatever reads it."""
        cache = ContextCache(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_tokens=400,
            dtype=torch.float32,
            device=torch.device("cpu"),
            pending_limit_bytes=10**9,
        )
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        return cache

    def fill(self, cache: ContextCache) -> None:
        for handle, features in enumerate(self.features):
            assert cache.add(handle, len(features) + self.config.block_size + handle)
            row = cache.get(handle)
            assert row is not None
            cache.append(features, [(row, 0, len(features))])

    def draft(self, cache: ContextCache, handles: Sequence[int]) -> list[ReferenceDraft]:
        rows = [row for handle in handles if (row := cache.get(handle)) is not None]
        anchors = self.anchors[list(handles)]
        self.model.extend(cache, rows)
        hidden = self.model.hidden(cache, rows, anchors.tolist())
        logits: list[Tensor] = []

        def draw(values: Tensor, slot: int) -> Tensor:
            logits.append(values.clone())
            return self.model.vocabulary.to_target(values.argmax(-1))

        drafted = self.model.draft(hidden, anchors, draw)
        stacked, confidence = torch.stack(logits, dim=1), drafted.confidence_logits
        return [
            ReferenceDraft(ids, stacked[r], None if confidence is None else confidence[r])
            for r, ids in enumerate(drafted.token_ids.tolist())
        ]

    def expected(self, handle: int) -> ReferenceDraft:
        token_ids = self.weights.token_ids
        return reference_draft(
            self.config,
            self.weights.tensors,
            embedding=self.parts.embedding,
            head=self.parts.head if token_ids is None else self.parts.head[token_ids],
            features=self.features[handle],
            anchor=int(self.anchors[handle]),
            token_ids=None if token_ids is None else token_ids.tolist(),
        )


def assert_close(got: ReferenceDraft, want: ReferenceDraft) -> None:
    assert got.token_ids == want.token_ids
    torch.testing.assert_close(got.logits.double(), want.logits.double(), atol=2e-4, rtol=1e-4)
    assert (got.confidence_logits is None) == (want.confidence_logits is None)
    if got.confidence_logits is not None and want.confidence_logits is not None:
        torch.testing.assert_close(
            got.confidence_logits.double(), want.confidence_logits.double(), atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_rows_agree_with_the_one_row_oracle(
    variant: str, rowwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "BlockAttention", lambda *args: BlockAttention(*args, rowwise=rowwise))
    setup = Setup(variant)
    cache = setup.cache()
    setup.fill(cache)
    for handle, got in enumerate(setup.draft(cache, range(len(LENGTHS)))):
        assert_close(got, setup.expected(handle))
    for handle in (4, 0):
        [got] = setup.draft(cache, [handle])
        assert_close(got, setup.expected(handle))


class NativeParts(PlainParts):
    """With the draft layers on the kernels."""

    def block_layers(self, weights: BlockWeights) -> RunBlocks | None:
        kernels = load_kernels()
        if kernels is None:
            pytest.skip("no compiler")
        return native_blocks(kernels, weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_in_one_call_agree_with_the_one_row_oracle(variant: str) -> None:
    setup = Setup(variant, parts=NativeParts.random(), head_dim=16, intermediate_size=64)
    has_windows = any(setup.config.layer_windows)
    assert (setup.model._blocks is None) == has_windows
    cache, another = setup.cache(), setup.cache()
    setup.fill(cache)
    setup.fill(another)
    for handles in (range(len(LENGTHS)), (4, 0)):
        for found in (setup.draft(cache, handles), setup.draft(another, handles)):
            for handle, got in zip(handles, found, strict=True):
                assert_close(got, setup.expected(handle))


def test_odd_widths_are_left_to_one_operation_after_another() -> None:
    setup = Setup("rnn", parts=NativeParts.random())
    assert setup.model._blocks is None
    cache = setup.cache()
    setup.fill(cache)
    assert_close(setup.draft(cache, [2])[0], setup.expected(2))


def test_padding_groups_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "BlockAttention", lambda *args: BlockAttention(*args, rowwise=False))
    for ratio in (1.0, 100.0):
        monkeypatch.setattr(block_attention, "_LENGTH_RATIO", ratio)
        setup = Setup("causal windows")
        cache = setup.cache()
        setup.fill(cache)
        for handle, got in enumerate(setup.draft(cache, range(len(LENGTHS)))):
            assert_close(got, setup.expected(handle))


@pytest.mark.parametrize("at_once", [5, 8192])
def test_rows_that_skipped_rounds_catch_up_to_what_rows_that_never_did_have(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_MAX_TOKENS_AT_ONCE", at_once)
    setup = Setup("rnn")
    steady, lazy = setup.cache(), setup.cache()
    for cache in (steady, lazy):
        for handle, features in enumerate(setup.features):
            assert cache.add(handle, len(features) + 5)
    for step in range(0, 64, 3):
        for handle, features in enumerate(setup.features):
            for cache in (steady, lazy):
                row = cache.get(handle)
                assert row is not None
                if step < len(features):
                    num_tokens = min(3, len(features) - step)
                    cache.append(features.clone(), [(row, step, num_tokens)])
        setup.draft(steady, range(len(LENGTHS)))
        setup.draft(lazy, [step % 2, 2])
    caught_up = setup.draft(lazy, range(len(LENGTHS)))
    for handle, (got, want) in enumerate(zip(caught_up, setup.draft(steady, range(len(LENGTHS))), strict=True)):
        assert_close(got, want)
        assert_close(got, setup.expected(handle))
    lazy.check_integrity()


def test_a_row_drafts_the_same_in_any_company() -> None:
    setup = Setup("gated")
    cache = setup.cache()
    setup.fill(cache)
    alone = [setup.draft(cache, [handle])[0] for handle in range(len(LENGTHS))]
    order = [3, 5, 0, 4]
    for handle, got in zip(order, setup.draft(cache, order), strict=True):
        assert_close(got, alone[handle])


def test_one_slot_ahead_of_the_longest_context_has_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("vanilla", lengths=(127,))
    cache = setup.cache()
    setup.fill(cache)
    [got] = setup.draft(cache, [0])
    assert_close(got, setup.expected(0))
