"""Times steps and drafts of a loaded model before the first row: the cost table of the automatic schedule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from time import perf_counter

import torch

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import Committed, Drafter, DraftRow
from dspark_batch.engine.config import EngineConfig
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.runner import TargetRunner
from dspark_batch.models.sources import cache_dir
from dspark_batch.provenance import device_facts, versions
from dspark_batch.scheduling.cost_cache import CostKey, load_table, save_table
from dspark_batch.scheduling.cost_table import CostTable
from dspark_batch.scheduling.profiler import Grid, measure_costs
from dspark_batch.tensors import ForwardBatch, RowSlice, Target

logger = logging.getLogger(__name__)

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Rows up to which costs are measured, unless more are decoded together."""

_BLOCK_DRAFTERS = frozenset({"dspark", "hybrid"})
_DRAFTERS_BY_TOKEN = frozenset({"draft_model"})
_DRAFT_CONTEXT_TOKENS = 128
_VERSIONS = ("torch", "dspark-batch")


def cost_table(
    target: Target, drafter: Drafter, config: EngineConfig, *, target_fingerprint: str, measure_anew: bool = False
) -> CostTable | None:
    """The table of this target on this device, from the cache folder or measured now and kept there.

    None where the target is not a loaded model, or has no room for a single row. Leaves no KV and no drafter state.
    """
    if not isinstance(target, TargetRunner):
        return None
    folder = cache_dir() / "costs"
    key = cost_key(target, drafter, config, target_fingerprint=target_fingerprint)
    most_rows = MOST_ROWS[target.device.type]
    if config.max_concurrency != "auto":
        most_rows = max(most_rows, config.max_concurrency)
    most_rows = min(most_rows, config.max_step_tokens)
    if not measure_anew:
        table = load_table(folder, key, most_rows=most_rows)
        if table is not None:
            return table
    started = perf_counter()
    table = measure_table(target, drafter, most_rows=most_rows, max_step_tokens=config.max_step_tokens)
    if table is None:
        return None
    save_table(folder, key, table, is_all_that_fits=table.most_rows < most_rows)
    logger.info("measured %d step costs in %.1f s", len(table.steps), perf_counter() - started)
    return table


def cost_key(target: TargetRunner, drafter: Drafter, config: EngineConfig, *, target_fingerprint: str) -> CostKey:
    """What decides the times of this target and drafter."""
    facts, known = device_facts(), versions()
    is_cuda = target.device.type == "cuda"
    built = [f"{name} {known.get(name, 'unknown')}" for name in _VERSIONS]
    if not is_cuda:
        # The library's name is a digest of its sources, its compiler and the CPU's features, among others.
        kernels = load_kernels()
        built.append(f"kernels {kernels.path.stem if kernels is not None else 'off'}")
    return CostKey(
        device=torch.cuda.get_device_name(target.device) if is_cuda else f"{facts.cpu} ({facts.num_cpus} usable)",
        threads=torch.get_num_threads(),
        target=target_fingerprint,
        dtype=str(target.dtype).removeprefix("torch."),
        drafter=f"{drafter.name}, {drafter.max_draft_tokens} tokens, taps {drafter.taps}, {config.drafter_path}",
        versions=tuple(built),
    )


def measure_table(
    target: TargetRunner, drafter: Drafter, *, most_rows: int, max_step_tokens: int, budget_s: float = 4.0
) -> CostTable | None:
    """Time steps for ``budget_s`` seconds or a little more."""
    # A block takes as long however much of it is asked for; two lengths would show noise as a cost of tokens.
    lengths: tuple[int, ...] = (drafter.max_draft_tokens,) if drafter.name in _BLOCK_DRAFTERS else ()
    if drafter.name in _DRAFTERS_BY_TOKEN:
        lengths = tuple(sorted({1, drafter.max_draft_tokens}))
    grid = Grid.for_engine(
        most_rows=most_rows,
        longest_draft=drafter.max_draft_tokens,
        max_context=target.max_context,
        draft_lengths=lengths,
    )
    steps = _StepTimer(target, taps=drafter.taps, max_step_tokens=max_step_tokens)
    drafts = _DraftTimer(target, drafter)
    return measure_costs(grid, time_step=steps, time_draft=drafts, budget_s=budget_s)


class _StepTimer:
    """Seconds of a forward, its logits and the choice of tokens. Reads whatever KV the pool holds."""

    def __init__(self, target: TargetRunner, *, taps: tuple[int, ...], max_step_tokens: int) -> None:
        self._target = target
        self._taps = taps
        self._max_step_tokens = max_step_tokens

    @torch.inference_mode()
    def __call__(self, context_tokens: int, num_rows: int, num_tokens: int) -> float | None:
        target = self._target
        longest = context_tokens + -(-num_tokens // num_rows)
        if num_tokens > self._max_step_tokens or longest > target.max_context:
            return None
        slots: list[int] = []
        try:
            while len(slots) < num_rows:
                slot = target.kv.allocate(longest)
                if slot is None:
                    return None
                slots.append(slot)
            lengths = [num_tokens // num_rows + (r < num_tokens % num_rows) for r in range(num_rows)]
            batch = ForwardBatch(
                token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=target.device),
                slices=tuple(RowSlice(s, context_tokens, n) for s, n in zip(slots, lengths, strict=True)),
                logit_index=torch.arange(num_tokens, device=target.device),
                taps=self._taps,
            )
            started = perf_counter()
            self._choose(target.forward(batch).hidden)
            return perf_counter() - started
        finally:
            for slot in slots:
                target.kv.free(slot)

    def _choose(self, hidden: torch.Tensor) -> list[int]:
        fast = self._target.fast_draws
        tokens = fast.greedy(hidden)[0] if fast is not None else self._target.logits(hidden).argmax(-1)
        chosen: list[int] = tokens.tolist()
        return chosen


class _DraftTimer:
    """Seconds of a drafting call for rows that are up to date but for one token."""

    def __init__(self, target: TargetRunner, drafter: Drafter) -> None:
        self._target = target
        self._drafter = drafter
        self._handles = count(-1, -1)
        self._context = max(1, min(_DRAFT_CONTEXT_TOKENS, target.max_context - drafter.max_draft_tokens - 4))

    @torch.inference_mode()
    def __call__(self, num_rows: int, num_tokens: int) -> float | None:
        vocab = self._target.vocab_size
        tokens = [[(7919 * r + 104729 * i) % vocab for i in range(self._context + 1)] for r in range(num_rows)]
        rows = [self._row(ids) for ids in tokens]
        added: list[DraftRow] = []
        try:
            for row in rows:
                self._drafter.add(row)
                added.append(row)
            self._observe(rows, 0)
            self._drafter.propose(rows, [num_tokens] * num_rows)
            for ids in tokens:
                ids.append(ids[0])
            self._observe(rows, self._context)
            started = perf_counter()
            block = self._drafter.propose(rows, [num_tokens] * num_rows)
            seconds = perf_counter() - started
            return seconds if all(block.token_ids) else None
        finally:
            for row in added:
                self._drafter.remove(row, finished=False)

    def _row(self, token_ids: Sequence[int]) -> DraftRow:
        sampling = SamplingParams(max_new_tokens=self._drafter.max_draft_tokens + 2, ignore_eos=True)
        # The token that is still to come is made up too: as part of the prompt it judges no draft.
        return DraftRow(next(self._handles), 0, sampling, token_ids, len(token_ids) + 1)

    def _observe(self, rows: Sequence[DraftRow], start: int) -> None:
        """All tokens but the last have their KV; the rows are of one length."""
        taps = len(self._drafter.taps)
        if not taps:
            return
        num_tokens = len(rows[0].token_ids) - 1 - start
        shape = (len(rows) * num_tokens, taps * self._target.spec.hidden_size)
        features = torch.zeros(shape, dtype=self._target.dtype, device=self._target.device)
        committed = [Committed(row, start, num_tokens, r * num_tokens) for r, row in enumerate(rows)]
        self._drafter.observe(committed, features)
