"""First weights whose drafts are good before any step: a first layer fitted by least squares, below it the target's
last layers.

The first draft layer is to give what the target's last layers read: the target's hidden state at a slot. It is close to
linear in two things that a block can see, the features of the last context token and the anchor's embedding. So some
heads of the layer always look at the former and some at the latter, and their values and outputs are the least-squares
solution, cut to the rank that they have. Its MLP adds nothing yet. Everything is trained from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.training.sequences import TokenRow
from dspark_batch.training.teacher import TaughtRows, Teacher

_NUM_FITTED_TOKENS = 24_000
_RIDGE = 1e-4
_SHARPNESS = 40.0
"""Attention logit of the token that a head is to look at; others are at least some below."""

_NEAR, _ANY = (1 / 32, 17 / 32), (0.5, 1.0)
"""Rotated pairs, as a part of all: fast ones that tell neighbours apart and slower ones against echoes far away; and
those that are alike over a block."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """N positions. context: [N, H] what draft layers read of the token before. block: [N, H] normalised embedding.
    wanted: [N, H] what attention is to add to the embedding."""

    context: Tensor
    block: Tensor
    wanted: Tensor


def fitted_tensors(
    config: DSparkConfig,
    teacher: Teacher,
    rows: Sequence[TokenRow],
    taught: TaughtRows,
    *,
    start: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """``start`` (of ``initial.initial_tensors``, from the target) with the first layer fitted to some of the rows.

    Raises:
        ConfigError: the drafter has one layer, one key head, or taps that leave out what its second layer reads.
    """
    source = teacher.spec.num_layers - config.num_layers
    _check(config, source)
    out = dict(start)
    hidden = config.hidden_size
    fc = torch.zeros_like(out["fc.weight"])
    at = config.taps.index(source) * hidden
    fc[:, at : at + hidden] = torch.eye(hidden)
    out["fc.weight"], out["hidden_norm.weight"] = fc, out["layers.1.input_layernorm.weight"].clone()
    sample = _sample(config, teacher, rows, taught, norm=out["hidden_norm.weight"], columns=slice(at, at + hidden))
    mask = _unit_rows(teacher.embed(torch.tensor([config.mask_token_id], device=teacher.device)), config)
    size = math.sqrt(_SHARPNESS / math.sqrt(config.head_dim))
    attention = "layers.0.self_attn."
    out |= {f"{attention}{name}.weight": tensor for name, tensor in _attention(config, sample, mask).items()}
    out |= {f"{attention}{x}_norm.weight": torch.full((config.head_dim,), size) for x in "qk"}
    out["layers.0.input_layernorm.weight"] = torch.ones(hidden)
    out["layers.0.mlp.down_proj.weight"] = torch.zeros_like(out["layers.0.mlp.down_proj.weight"])
    return out


def _check(config: DSparkConfig, source: int) -> None:
    problems = []
    if config.num_layers < 2:
        problems.append(Problem("drafter.num_layers", "must be at least 2 for drafter.init: fitted"))
    if config.num_kv_heads < 2:
        problems.append(Problem("drafter.num_kv_heads", "must be at least 2 for drafter.init: fitted"))
    if source not in config.taps:
        problems.append(
            Problem("drafter.taps", f"{list(config.taps)} must have {source} among them for drafter.init: fitted")
        )
    if problems:
        raise ConfigError(problems)


def _sample(
    config: DSparkConfig,
    teacher: Teacher,
    rows: Sequence[TokenRow],
    taught: TaughtRows,
    *,
    norm: Tensor,
    columns: slice,
) -> _Sample:
    step = max(1, sum(len(row.token_ids) for row in rows) // _NUM_FITTED_TOKENS)
    context, block, wanted = [], [], []
    for number in range(0, len(rows), step):
        row = rows[number]
        features = taught.get([number])[0].features[:, columns].float().cpu()
        embedded = teacher.embed(torch.from_numpy(row.token_ids).long().to(teacher.device)).float().cpu()
        first, end = max(1, row.prompt_len), len(features)
        context.append(_unit_rows(features[first - 1 : end - 1], config) * norm)
        block.append(_unit_rows(embedded[first:end], config))
        wanted.append(features[first:end] - embedded[first:end])
    return _Sample(torch.cat(context), torch.cat(block), torch.cat(wanted))


def _attention(config: DSparkConfig, sample: _Sample, mask: Tensor) -> dict[str, Tensor]:
    """Projections of the first layer. The last third of its key heads look at the anchor, the others at the context."""
    num, dim, hidden = config.num_kv_heads, config.head_dim, config.hidden_size
    num_anchor = max(1, num // 3)
    num_context = num - num_anchor
    solution = _least_squares(torch.cat((sample.context, sample.block), dim=1), sample.wanted)
    spread = sample.wanted.std(0).clamp_min(1e-6)
    context_v, context_o = _low_rank(solution[:hidden], sample.context, spread, rank=num_context * dim)
    anchor_v, anchor_o = _low_rank(solution[hidden:], sample.block, spread, rank=num_anchor * dim)
    masks = mask.expand(max(1, len(sample.block) // 8), -1)
    ask = _telling(yes=(sample.block, masks), no=())
    keys = [_telling(yes=(sample.context,), no=(sample.block, masks))] * num_context
    keys += [_telling(yes=(sample.block,), no=(sample.context, masks))] * num_anchor
    patterns = [_pattern(dim, _NEAR)] * num_context + [_pattern(dim, _ANY)] * num_anchor
    k = torch.cat([torch.outer(pattern, key) for pattern, key in zip(patterns, keys, strict=True)])
    group = config.num_heads // num
    q = torch.cat([torch.outer(pattern, ask) for pattern in patterns for _ in range(group)])
    # Of the query heads that share a key head, the first brings its values; the others are free.
    o = torch.zeros(hidden, num, group, dim)
    o[:, :, 0] = torch.cat((context_o, anchor_o), dim=1).view(hidden, num, dim)
    return {
        "q_proj": q,
        "k_proj": k,
        "v_proj": torch.cat((context_v, anchor_v)),
        "o_proj": o.reshape(hidden, config.num_heads * dim),
    }


def _least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """[in, out]"""
    gram = (inputs.T @ inputs).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, (inputs.T @ outputs).double())
    return solution.float()


def _low_rank(solution: Tensor, inputs: Tensor, spread: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """(down [rank, in], up [out, rank]) with up @ down close to ``solution.T`` on the inputs, in units of the outputs'
    spread; what lies between has size one."""
    scaled = solution / spread
    fitted = inputs @ scaled
    rank_found = min(rank, scaled.shape[1])
    directions = torch.linalg.eigh((fitted.T @ fitted).double())[1][:, -rank_found:].float()
    down = scaled @ directions
    size = (inputs @ down).square().mean(0).sqrt().clamp_min(1e-6)
    down_rows = functional.pad((down / size).T, (0, 0, 0, rank - rank_found))
    return down_rows, functional.pad(spread[:, None] * directions * size, (0, rank - rank_found))


def _telling(*, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> Tensor:
    """[H] of size one: a direction whose product is positive with the rows of ``yes`` and negative with ``no``."""
    inputs = torch.cat((*yes, *no))
    signs = torch.cat([torch.ones(sum(map(len, yes))), -torch.ones(sum(map(len, no)))])
    found = _least_squares(inputs, signs[:, None])[:, 0]
    return functional.normalize(found, dim=0)


def _pattern(head_dim: int, pairs: tuple[float, float]) -> Tensor:
    """[D]: the first halves of some rotated pairs. Two such heads score the sum of cos(distance * frequency)."""
    half = head_dim // 2
    first = round(pairs[0] * half)
    last = max(first + 1, round(pairs[1] * half))
    pattern = torch.zeros(head_dim)
    pattern[first:last] = 1.0
    return pattern


def _unit_rows(x: Tensor, config: DSparkConfig) -> Tensor:
    return functional.rms_norm(x.float().cpu(), (x.shape[-1],), None, config.norm_eps)
