"""Draft model: a smaller causal language model with the target's vocabulary proposes tokens one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.margins import shared_noise_margin, top2_margin
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import UnsupportedModelError
from dspark_batch.models.convert import materialise
from dspark_batch.models.loader import load_target
from dspark_batch.models.sources import resolve_source
from dspark_batch.models.text import TextCodec
from dspark_batch.sampling.sampler import PositionBatch, SampledRow
from dspark_batch.sampling.streams import Stream
from dspark_batch.tensors import DraftBlock, ForwardBatch, RowSlice, Target

DEFAULT_DRAFT_TOKENS = 5
MAX_DRAFT_TOKENS = 64
_NUM_TOKENIZER_PROBES = 512


@dataclass(slots=True)
class _State:
    """slot: None while the cache has no room. kv_len: committed positions whose KV is written. speculative: drafted
    tokens whose KV stands after them; they count once they are committed. num_rounds: drafts made, keys their noise."""

    capacity: int
    slot: int | None = None
    kv_len: int = 0
    speculative: list[int] = field(default_factory=list)
    num_rounds: int = 0


class DraftModelDrafter:
    """Drafts with its own ragged KV cache: one catch-up forward, then one flat forward per further token.

    coupled: draw with the row's shared noise at the absolute position, as coupled verification does, and give no
    probabilities. Otherwise draw from q by the draft stream and give q. Greedy rows draft greedily either way. A row
    that finds no room in the cache is not drafted for; it never waits.
    """

    name = "draft_model"
    taps: tuple[int, ...] = ()

    def __init__(
        self,
        model: Target,
        *,
        coupled: bool = True,
        max_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        max_step_tokens: int = 2048,
        poison_dead_kv: bool = False,
    ) -> None:
        assert 1 <= max_draft_tokens <= MAX_DRAFT_TOKENS, max_draft_tokens
        self.max_draft_tokens = max_draft_tokens
        self._model = model
        self._coupled = coupled
        self._max_step_tokens = max_step_tokens
        self._poison_dead_kv = poison_dead_kv
        self._states: dict[int, _State] = {}

    @classmethod
    def from_config(cls, config: EngineConfig, target: Target, *, target_fingerprint: str) -> DraftModelDrafter:
        """The checkpoint at ``config.drafter_path``, in the target's dtype and with a KV cache of the same budget.

        Raises:
            ModelError: the checkpoint is missing or damaged.
            UnsupportedModelError: its vocabulary or tokenizer is not the target's.
        """
        assert config.drafter_path is not None, "the caller checks drafter_path"
        loaded = load_target(config.model_copy(update={"target": config.drafter_path, "revision": None}))
        _check_vocabulary(config, target.vocab_size, loaded.target.vocab_size)
        target_folder = materialise(resolve_source(config.target, revision=config.revision))
        _check_tokenizer(config, TextCodec.from_folder(target_folder), loaded.codec)
        return cls(
            loaded.target,
            coupled=config.verification == "coupled",
            max_draft_tokens=config.max_draft_tokens or DEFAULT_DRAFT_TOKENS,
            max_step_tokens=config.max_step_tokens,
            poison_dead_kv=config.poison_dead_kv,
        )

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._states, f"row {row.handle} was added twice"
        longest = row.prompt_len + row.sampling.max_new_tokens
        self._states[row.handle] = _State(capacity=min(longest, self._model.max_context))

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        """Nothing to do: ``propose`` catches up with what was committed since."""

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        slot = self._states.pop(row.handle).slot
        if slot is not None:
            self._model.kv.free(slot)

    @torch.inference_mode()
    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        drafts = [_Draft(row, self._states[row.handle]) for row in rows]
        for draft, wanted in zip(drafts, max_tokens, strict=True):
            room = draft.state.capacity - len(draft.row.token_ids)
            draft.limit = max(0, min(wanted, self.max_draft_tokens, room))
            if draft.limit and not self._reserve(draft.state):
                draft.limit = 0
        active = [draft for draft in drafts if draft.limit]
        if active:
            self._draft(active)
        probs = None if self._coupled else [torch.stack(d.probs) if d.probs else None for d in drafts]
        return DraftBlock(token_ids=[d.tokens for d in drafts], probs=probs, margin=[d.margins for d in drafts])

    def _reserve(self, state: _State) -> bool:
        if state.slot is None:
            state.slot = self._model.kv.allocate(state.capacity)
        return state.slot is not None

    def _draft(self, drafts: Sequence[_Draft]) -> None:
        for draft in drafts:
            draft.roll_back()
            draft.state.num_rounds += 1
        hidden = self._catch_up(drafts)
        while True:
            drafts = self._draw(drafts, self._model.logits(hidden))
            if not drafts:
                return
            parts = [(draft, [draft.tokens[-1]]) for draft in drafts]
            hidden = self._forward(parts, [len(d.row.token_ids) + len(d.tokens) - 1 for d in drafts], wanted=len(parts))
            for draft in drafts:
                draft.state.speculative.append(draft.tokens[-1])

    def _catch_up(self, drafts: Sequence[_Draft]) -> Tensor:
        """KV of every committed token; [R, H] hidden states of the anchors. One pass if ``max_step_tokens`` allows."""
        ends: dict[int, Tensor] = {}
        waiting = list(drafts)
        while waiting:
            parts: list[tuple[_Draft, Sequence[int]]] = []
            spare = self._max_step_tokens
            for draft in waiting:
                new = draft.row.token_ids[draft.state.kv_len : draft.state.kv_len + spare]
                parts.append((draft, new))
                spare -= len(new)
                if spare <= 0:
                    break
            starts = [draft.state.kv_len for draft, _ in parts]
            for draft, new in parts:
                draft.state.kv_len += len(new)
            done = [draft for draft, _ in parts if draft.state.kv_len == len(draft.row.token_ids)]
            hidden = self._forward(parts, starts, wanted=len(done))
            ends.update(zip([draft.row.handle for draft in done], hidden, strict=True))
            waiting = waiting[len(done) :]
        return torch.stack([ends[draft.row.handle] for draft in drafts])

    def _forward(self, parts: Sequence[tuple[_Draft, Sequence[int]]], starts: Sequence[int], *, wanted: int) -> Tensor:
        """One flat forward; hidden states of the last tokens of the first ``wanted`` parts, [wanted, H]."""
        flat = [token for _, new in parts for token in new]
        slices = []
        for (draft, new), start in zip(parts, starts, strict=True):
            assert draft.state.slot is not None, "only rows with a slot are drafted for"
            slices.append(RowSlice(slot=draft.state.slot, kv_len=start, num_tokens=len(new)))
        last = np.cumsum([len(new) for _, new in parts])[:wanted] - 1
        device = self._model.device
        return self._model.forward(
            ForwardBatch(
                token_ids=torch.tensor(flat, dtype=torch.int64).to(device),
                slices=tuple(slices),
                logit_index=torch.from_numpy(last.astype(np.int64)).to(device),
            )
        ).hidden

    def _draw(self, drafts: Sequence[_Draft], logits: Tensor) -> list[_Draft]:
        """Append one token to each draft; gives those that want another."""
        rows = [draft.sampled_row(coupled=self._coupled) for draft in drafts]
        batch = PositionBatch(logits, rows)
        finite, margins = batch.finite(), self._margins(batch.logits, rows)
        keeps_probs = not self._coupled and any(not d.row.sampling.is_greedy for d in drafts)
        probs = batch.probs() if keeps_probs else None
        going_on = []
        for index, (draft, token) in enumerate(zip(drafts, batch.draw(), strict=True)):
            if not finite[index]:
                continue
            draft.tokens.append(token)
            draft.margins.append(margins[index])
            if probs is not None and not draft.row.sampling.is_greedy:
                draft.probs.append(probs[index])
            if len(draft.tokens) < draft.limit:
                going_on.append(draft)
            elif self._poison_dead_kv:
                draft.poison(self._model)
        return going_on

    def _margins(self, logits: Tensor, rows: Sequence[SampledRow]) -> list[float]:
        """Without shared noise the lead of the logits: it must not depend on the token that was drawn."""
        if self._coupled:
            sampling, keys = [row.sampling for row in rows], [row.noise_key for row in rows]
            found = shared_noise_margin(logits, sampling, keys=keys, positions=[row.start for row in rows])
        else:
            found = top2_margin(logits)
        margins: list[float] = found.tolist()
        return margins

    def check_integrity(self) -> None:
        self._model.kv.check_integrity()
        for state in self._states.values():
            assert state.kv_len + len(state.speculative) <= state.capacity
            assert state.slot is not None or state.kv_len == 0


@dataclass(slots=True, eq=False)
class _Draft:
    """The draft of one row while it grows."""

    row: DraftRow
    state: _State
    limit: int = 0
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def roll_back(self) -> None:
        """Count the speculative KV that was committed and drop the rest; the anchor is always run again."""
        state, tokens = self.state, self.row.token_ids
        state.kv_len = min(state.kv_len, len(tokens) - 1)
        for token in state.speculative:
            if state.kv_len >= len(tokens) - 1 or tokens[state.kv_len] != token:
                break
            state.kv_len += 1
        state.speculative = []

    def sampled_row(self, *, coupled: bool) -> SampledRow:
        row, k = self.row, len(self.tokens)
        seen = None
        if row.sampling.repetition_penalty != 1.0:
            seen = np.array([*row.token_ids, *self.tokens], dtype=np.int64)
        if coupled:
            return SampledRow(row.sampling, row.noise_key, len(row.token_ids) + k, (), seen)
        counter = self.state.num_rounds * MAX_DRAFT_TOKENS + k
        return SampledRow(row.sampling, row.noise_key ^ Stream.DRAFT.value, counter, (), seen)

    def poison(self, model: Target) -> None:
        assert self.state.slot is not None
        model.kv.poison(self.state.slot, self.state.kv_len + len(self.state.speculative))


def _check_vocabulary(config: EngineConfig, target_size: int, draft_size: int) -> None:
    if draft_size != target_size:
        raise UnsupportedModelError(
            f"speculation.path: {config.drafter_path!r} has a vocabulary of {draft_size} tokens, target "
            f"{config.target!r} has {target_size}; a draft model must share the target's vocabulary"
        )


def _check_tokenizer(config: EngineConfig, target: TextCodec | None, draft: TextCodec | None) -> None:
    """Refuse a tokenizer that names tokens differently. Checkpoints without one are taken at their word."""
    if target is None or draft is None:
        return
    step = max(1, target.num_tokens // _NUM_TOKENIZER_PROBES)
    same = target.num_tokens == draft.num_tokens and all(
        target.decode([i], skip_special_tokens=False) == draft.decode([i], skip_special_tokens=False)
        for i in range(0, target.num_tokens, step)
    )
    if not same:
        raise UnsupportedModelError(
            f"speculation.path: the tokenizer of {config.drafter_path!r} ({draft.num_tokens} tokens) is not that of "
            f"target {config.target!r} ({target.num_tokens} tokens); a draft model must share the target's tokenizer"
        )
