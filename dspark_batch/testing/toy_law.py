"""Exact laws of one speculative round over a toy vocabulary, by enumeration of every draft and every outcome."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_batch.verification.rejection import Decision, Slots, make_slots, residual_weights

Prefix = tuple[int, ...]
Table = dict[Prefix, NDArray[np.float64]]
Rule = Callable[[Slots, torch.Tensor, "torch.Tensor | None"], Decision]
Extend = Callable[[Prefix, Prefix], bool]
"""(tokens before slot k, the whole draft) -> whether slot k is verified. Legal rules ignore the second argument."""


def random_table(rng: np.random.Generator, *, vocab_size: int, depth: int, zeros: float = 0.0) -> Table:
    """A conditional distribution for every prefix shorter than ``depth``; entries vanish with probability ``zeros``."""
    table: Table = {}
    for length in range(depth):
        for prefix in itertools.product(range(vocab_size), repeat=length):
            row = rng.dirichlet(np.ones(vocab_size)) * (rng.random(vocab_size) >= zeros)
            if row.sum() == 0:
                row[rng.integers(vocab_size)] = 1.0
            table[prefix] = row / row.sum()
    return table


def one_hot_table(table: Table) -> Table:
    """The table of a drafter that always proposes the likeliest token."""
    return {prefix: np.eye(len(row))[row.argmax()] for prefix, row in table.items()}


def joint_law(table: Table, *, length: int, given: Prefix = ()) -> dict[Prefix, float]:
    """The law of the first ``length`` tokens, those in ``given`` fixed."""
    law = {given: 1.0}
    while len(next(iter(law))) < length:
        law = {(*x, v): w * pv for x, w in law.items() for v, pv in enumerate(table[x]) if pv > 0}
    return law


def round_law(
    target: Table, draft: Table, *, block_size: int, decide: Rule, independent: bool, extend: Extend, one_hot: bool
) -> dict[Prefix, float]:
    """The law of the first block_size + 1 tokens when one round is speculative and the rest is sampled plainly.

    decide: the rule's thresholds. independent: the longest prefix ending in a pass stands (block), else the prefix of
    passes (token). one_hot: give the rule no draft probabilities.
    """
    drafts = joint_law(draft, length=block_size)
    verified = {x: x[: _verify_len(x, extend)] for x in drafts}
    rows = list(drafts)
    slots = make_slots([verified[x] for x in rows], [one_hot] * len(rows), torch.device("cpu"))
    p = torch.tensor(np.array([target[verified[x][:k]] for x in rows for k in range(len(verified[x]) + 1)]))
    q_rows = [draft[verified[x][:k]] for x in rows for k in range(len(verified[x]))]
    q = None if one_hot or not q_rows else torch.tensor(np.array(q_rows))
    decision = decide(slots, p, q)

    law: dict[Prefix, float] = dict.fromkeys(joint_law(target, length=block_size + 1), 0.0)
    num_slots = slots.num_slots.numpy()
    for accepted in range(block_size + 1):
        alive = torch.full((len(rows),), accepted).minimum(slots.num_slots)
        weight = decision.weight.gather(1, alive.unsqueeze(1)).squeeze(1)
        left = residual_weights(slots, alive, weight, p, q).numpy()
        left = left / np.maximum(left.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        for r, x in enumerate(rows):
            if accepted > num_slots[r]:
                continue
            chance = drafts[x] * _stop_chance(decision.thresholds[r, : num_slots[r]].tolist(), accepted, independent)
            for token in np.flatnonzero(left[r] * chance):
                emitted = (*x[:accepted], int(token))
                for rest, w in joint_law(target, length=block_size + 1, given=emitted).items():
                    law[rest] = law.get(rest, 0.0) + chance * left[r, token] * w
    return law


def total_variation(a: dict[Prefix, float], b: dict[Prefix, float]) -> float:
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys())


def _verify_len(draft: Prefix, extend: Extend) -> int:
    for k in range(len(draft)):
        if not extend(draft[:k], draft):
            return k
    return len(draft)


def _stop_chance(thresholds: Sequence[float], accepted: int, independent: bool) -> float:
    """The probability that exactly ``accepted`` drafts stand."""
    if independent:
        last = 1.0 if accepted == 0 else thresholds[accepted - 1]
        return last * float(np.prod([1.0 - h for h in thresholds[accepted:]]))
    fail = 1.0 if accepted == len(thresholds) else 1.0 - thresholds[accepted]
    return float(np.prod(thresholds[:accepted])) * fail
