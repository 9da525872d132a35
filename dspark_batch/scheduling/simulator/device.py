"""What a step costs on a device that is not here: a roofline of a GPU with its model and drafter, or a measured table.

The roofline (``RooflineDevice``) counts, for a step of T flat tokens in R rows with C tokens of context in all:

- matrix products: max(weight bytes / bandwidth, 2 x weights x T' / flops), T' being T rounded up to whole tiles (the
  GPU's staircase);
- attention: max(KV bytes of C tokens / bandwidth, 4 x layers x query heads x head size x (T/R x C) / flops). The KV of
  a row is read once, however many of its tokens are verified;
- logits: the vocabulary's scores written and read a few times in float32, at every position that needs a token;
- a fixed time for launches, sampling and the host.

These run one after the other, so they add up. A draft costs the same kinds of work over the drafter's own weights, the
target's head and block_size tokens a row, and a fixed time per sequential slot. Nothing is measured: the figures are
for comparing schedules, and hold as far as the datasheet's bandwidth and flops, times stated efficiencies, do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dspark_batch.scheduling.cost import DraftCost
from dspark_batch.scheduling.cost_table import CostSurface, CostTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One forward. num_rows: rows that decode. num_tokens: flat tokens, prompt tokens included. num_logits: positions
    that need a token. num_context_tokens: KV that is read, summed over rows."""

    num_rows: int
    num_tokens: int
    num_logits: int
    num_context_tokens: int


class Device(Protocol):
    """A clock for the simulator."""

    @property
    def num_kv_tokens(self) -> int:
        """Room for keys and values, in tokens of all rows."""
        ...

    def step_s(self, work: StepWork) -> float: ...

    def draft_s(self, *, num_rows: int, longest: int, num_context_tokens: int) -> float:
        """Seconds of one drafting call for ``num_rows`` rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """Datasheet figures and the share of them that kernels reach. tile_tokens: granularity of matrix products."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: float
    bandwidth_efficiency: float
    flops_efficiency: float
    tile_tokens: int
    step_overhead_s: float
    draft_overhead_s: float
    slot_overhead_s: float

    @property
    def reached_bandwidth(self) -> float:
        return self.bandwidth_bytes_per_s * self.bandwidth_efficiency

    @property
    def reached_flops(self) -> float:
        return self.flops_per_s * self.flops_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense decoder in bfloat16, keys and values included."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def num_layer_weights(self) -> int:
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_product_weights(self) -> int:
        """Weights that every token is multiplied with, the head included."""
        return self.num_layers * self.num_layer_weights + self.num_head_weights

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * self.kv_bytes_per_layer_token

    @property
    def kv_bytes_per_layer_token(self) -> int:
        return 2 * 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """A block drafter with the target's layer shape and head, such as DSpark: block_size draft tokens at once."""

    num_layers: int
    block_size: int
    num_taps: int
    markov_rank: int


H100 = GpuSpec(
    name="H100 SXM 80 GB",
    memory_bytes=80e9,
    bandwidth_bytes_per_s=3.35e12,
    flops_per_s=989e12,
    bandwidth_efficiency=0.85,
    flops_efficiency=0.65,
    tile_tokens=64,
    step_overhead_s=1.0e-3,
    draft_overhead_s=0.3e-3,
    slot_overhead_s=30e-6,
)
QWEN3_8B = ModelSpec(
    name="Qwen3-8B",
    num_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
)
DSPARK_BLOCK7 = DrafterSpec(num_layers=5, block_size=7, num_taps=5, markov_rank=256)

_LOGIT_PASSES = 4
_MEMORY_SHARE = 0.92


@dataclass(frozen=True, slots=True)
class RooflineDevice:
    """See the module. num_kv_tokens: what fits beside the weights of both models, with the drafter's own context."""

    gpu: GpuSpec = H100
    model: ModelSpec = QWEN3_8B
    drafter: DrafterSpec = DSPARK_BLOCK7

    @property
    def num_kv_tokens(self) -> int:
        weights = self.model.num_product_weights + self.model.num_head_weights + self._draft_weights
        room = self.gpu.memory_bytes * _MEMORY_SHARE - 2 * weights
        return int(room // (self.model.kv_bytes_per_token + self._draft_kv_bytes))

    def step_s(self, work: StepWork) -> float:
        if not work.num_tokens:
            return 0.0
        model = self.model
        attention_flops = 4 * model.num_layers * model.num_heads * model.head_dim
        logits_s = _LOGIT_PASSES * 4 * model.vocab_size * work.num_logits / self.gpu.reached_bandwidth
        return (
            self.gpu.step_overhead_s
            + self._products_s(model.num_product_weights, work.num_tokens)
            + self._attention_s(work, model.kv_bytes_per_token, attention_flops)
            + logits_s
        )

    def draft_s(self, *, num_rows: int, longest: int, num_context_tokens: int) -> float:
        """The whole block is always computed, so ``longest`` does not matter beyond being positive."""
        if not num_rows or not longest:
            return 0.0
        drafter, model = self.drafter, self.model
        num_tokens = drafter.block_size * num_rows
        work = StepWork(num_rows=num_rows, num_tokens=num_tokens, num_logits=0, num_context_tokens=num_context_tokens)
        attention_flops = 4 * drafter.num_layers * model.num_heads * model.head_dim
        logits_s = _LOGIT_PASSES * 4 * model.vocab_size * num_tokens / self.gpu.reached_bandwidth
        slots_s = drafter.block_size * self.gpu.slot_overhead_s
        return (
            self.gpu.draft_overhead_s
            + self._products_s(self._draft_weights + model.num_head_weights, num_tokens)
            + self._attention_s(work, self._draft_kv_bytes, attention_flops)
            + logits_s
            + slots_s
        )

    @property
    def _draft_weights(self) -> int:
        """Without the target's embedding and head, which it shares."""
        model, drafter = self.model, self.drafter
        own = drafter.num_layers * model.num_layer_weights + drafter.num_taps * model.hidden_size**2
        return own + drafter.markov_rank * model.vocab_size

    @property
    def _draft_kv_bytes(self) -> int:
        return self.drafter.num_layers * self.model.kv_bytes_per_layer_token

    def _products_s(self, num_weights: int, num_tokens: int) -> float:
        tiles = math.ceil(num_tokens / self.gpu.tile_tokens) * self.gpu.tile_tokens
        return max(2 * num_weights / self.gpu.reached_bandwidth, 2 * num_weights * tiles / self.gpu.reached_flops)

    def _attention_s(self, work: StepWork, kv_bytes: int, flops_per_pair: int) -> float:
        pairs = work.num_tokens / max(1, work.num_rows) * work.num_context_tokens
        return max(
            kv_bytes * work.num_context_tokens / self.gpu.reached_bandwidth,
            flops_per_pair * pairs / self.gpu.reached_flops,
        )


class ProfiledDevice:
    """A device as its cost table has it, such as ``dspark-batch profile`` measured.

    A row is measured with a few tokens; a step with more of them, such as prompts, takes as long as one of more rows.
    noise: standard deviation of the logarithm of every time.
    """

    def __init__(self, table: CostTable, *, num_kv_tokens: int = 2**31, noise: float = 0.0, seed: int = 0) -> None:
        self.num_kv_tokens = num_kv_tokens
        self._surface = CostSurface(table.steps)
        self._draft_cost = DraftCost(table.drafts)
        self._most_rows = table.most_rows
        self._most_tokens_of_row = max(step.num_tokens // step.num_rows for step in table.steps)
        self._noise = noise
        self._random = np.random.default_rng(seed)

    def step_s(self, work: StepWork) -> float:
        if not work.num_tokens:
            return 0.0
        num_rows = max(1, work.num_rows, min(self._most_rows, work.num_tokens // self._most_tokens_of_row))
        context_tokens = work.num_context_tokens / max(1, work.num_rows)
        return self._noisy(self._surface.at(work.num_tokens, num_rows=num_rows, context_tokens=context_tokens))

    def draft_s(self, *, num_rows: int, longest: int, num_context_tokens: int) -> float:
        return self._noisy(self._draft_cost.seconds(num_rows, longest))

    def _noisy(self, seconds: float) -> float:
        return seconds * math.exp(self._random.normal(0.0, self._noise)) if self._noise else seconds
