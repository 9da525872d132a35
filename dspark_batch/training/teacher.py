"""The frozen target as training sees it: features, outputs and normalisers of whole rows in dense passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.errors import UnsupportedModelError
from dspark_batch.job.config import ModelSection
from dspark_batch.models.convert import materialise
from dspark_batch.models.decoder import Decoder
from dspark_batch.models.families import DecoderSpec, decoder_spec
from dspark_batch.models.loader import read_json
from dspark_batch.models.ops import TorchOps
from dspark_batch.models.rope import RopeTable, rope_table
from dspark_batch.models.sources import resolve_source, weights_fingerprint
from dspark_batch.models.weights import DecoderWeights, load_weights
from dspark_batch.tensors import ForwardBatch, RowSlice
from dspark_batch.training.features import FeatureFiles
from dspark_batch.training.sequences import TokenRow

_HEAD_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
_UNITS_AT_ONCE = 64
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True, slots=True, eq=False)
class TaughtRow:
    """What the target says about one row of L tokens. features: [L, taps * H]. hidden: [L - first, H], final-norm
    outputs from position ``first`` on. log_z: [L - first] float32, log of the sum of exponentials of its logits; None
    where it was not kept. Kept features have no last position, and zeros stand for its output."""

    features: Tensor
    hidden: Tensor
    log_z: Tensor | None
    first: int

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.features, self.hidden, self.log_z) if t is not None)


class Teacher:
    """A target without KV cache, for whole rows at a time. Nothing of it is differentiated."""

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, *, rope_fields: Mapping[str, object], max_tokens: int
    ) -> None:
        window = min((w for w in spec.sliding_windows if w is not None), default=None)
        if window is not None and window < max_tokens:
            raise UnsupportedModelError(
                f"the target's sliding window of {window} tokens is shorter than optimize.max_sequence_tokens "
                f"({max_tokens}); lower that to {window}"
            )
        self.spec, self.rope_fields = spec, dict(rope_fields)
        self._weights = weights
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        rope = rope_table(
            spec.rope, head_dim=spec.head_dim, num_positions=max_tokens, dtype=self.dtype, device=self.device
        )
        self._decoder = Decoder(spec, weights=weights, attention=_CausalRows(spec, weights, rope), ops=TorchOps())

    def embed(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H]"""
        return functional.embedding(token_ids, self._weights.embedding)

    @torch.no_grad()
    def head_rows(self, token_ids: Tensor | None) -> Tensor:
        """Rows [Vd, H] of the head, in whatever layout it is kept: its product with unit vectors. None: all rows."""
        if self.spec.tied_head:
            return self._weights.embedding if token_ids is None else self._weights.embedding[token_ids]
        columns = []
        for start in range(0, self.spec.hidden_size, _UNITS_AT_ONCE):
            width = min(_UNITS_AT_ONCE, self.spec.hidden_size - start)
            units = torch.zeros(width, self.spec.hidden_size, dtype=self.dtype, device=self.device)
            units[:, start : start + width].fill_diagonal_(1.0)
            column = self._weights.head(units).T
            columns.append(column if token_ids is None else column[token_ids])
        return torch.cat(columns, dim=1).contiguous()

    @torch.no_grad()
    def final_norm(self, x: Tensor) -> Tensor:
        """[N, H] output of the last layer -> [N, H] what the head reads."""
        normed = functional.rms_norm(x.float(), (x.shape[-1],), None, self.spec.norm_eps).to(x.dtype)
        return normed * self._weights.final_norm

    @torch.no_grad()
    def teach(self, rows: Sequence[TokenRow], *, taps: tuple[int, ...]) -> list[TaughtRow]:
        """Features of all positions, outputs from each row's first response token on."""
        taught: list[TaughtRow] = []
        for part in _parts(rows, _TOKENS_AT_ONCE[self.device.type]):
            taught += self._teach(part, taps)
        return taught

    def _teach(self, rows: Sequence[TokenRow], taps: tuple[int, ...]) -> list[TaughtRow]:
        sizes = [len(row.token_ids) for row in rows]
        token_ids = torch.cat([torch.from_numpy(row.token_ids).long() for row in rows]).to(self.device)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        wanted = [
            torch.arange(start + row.prompt_len, start + size)
            for start, size, row in zip(starts, sizes, rows, strict=True)
        ]
        slices = tuple(RowSlice(slot=i, kv_len=0, num_tokens=size) for i, size in enumerate(sizes))
        batch = ForwardBatch(token_ids, slices, torch.cat(wanted).to(self.device), taps)
        out = self._decoder.forward(batch)
        assert out.features is not None, "taps were asked for"
        features = torch.split(out.features, sizes)
        counts = [len(part) for part in wanted]
        hidden, log_z = torch.split(out.hidden, counts), torch.split(self._log_z(out.hidden), counts)
        return [
            TaughtRow(features[i].clone(), hidden[i].clone(), log_z[i].clone(), row.prompt_len)
            for i, row in enumerate(rows)
        ]

    def _log_z(self, hidden: Tensor) -> Tensor:
        size = max(1, _HEAD_CHUNK_ELEMENTS[self.device.type] // self.spec.vocab_size)
        return torch.cat([self._weights.head(part).float().logsumexp(-1) for part in torch.split(hidden, size)])


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """fingerprint: of the target's files. folder: where its safetensors lie."""

    teacher: Teacher
    fingerprint: str
    folder: Path


def load_teacher(model: ModelSection, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> LoadedTeacher:
    """The target of a config, for rows of at most ``max_tokens``.

    Raises:
        ModelError: it is missing, damaged or not supported.
    """
    source = resolve_source(model.target, revision=model.revision)
    folder = materialise(source)
    checkpoint = read_json(folder / "config.json")
    spec = decoder_spec(checkpoint, where=str(folder / "config.json"))
    weights = load_weights(folder, spec, dtype=dtype, device=device)
    names = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
    fields = {name: checkpoint[name] for name in names if checkpoint.get(name) is not None}
    teacher = Teacher(spec, weights, rope_fields=fields, max_tokens=max_tokens)
    return LoadedTeacher(teacher, weights_fingerprint(source), folder)


class TaughtRows:
    """Rows with what the target says about them: read where it was kept with the responses; else computed, and kept in
    memory up to a bound, beyond which rows are computed again each time."""

    def __init__(
        self,
        teacher: Teacher,
        rows: Sequence[TokenRow],
        *,
        taps: tuple[int, ...],
        limit_bytes: int,
        files: FeatureFiles | None = None,
    ) -> None:
        self._teacher, self._rows, self._taps, self._limit_bytes = teacher, rows, taps, limit_bytes
        self._files = files
        self._kept: dict[int, TaughtRow] = {}
        self.num_bytes = 0
        self.num_computed_tokens = 0
        self.num_computed_outputs = 0

    def get(self, numbers: Sequence[int]) -> list[TaughtRow]:
        """The rows of these numbers, missing ones computed together."""
        read = {n: row for n in dict.fromkeys(numbers) if n not in self._kept and (row := self._read(n)) is not None}
        missing = [n for n in dict.fromkeys(numbers) if n not in self._kept and n not in read]
        rows = [self._rows[n] for n in missing]
        fresh = dict(zip(missing, self._teacher.teach(rows, taps=self._taps), strict=True)) if missing else {}
        self.num_computed_tokens += sum(len(row.token_ids) for row in rows)
        self.num_computed_outputs += sum(row.num_response_tokens for row in rows)
        for number, row in fresh.items():
            if self.num_bytes + row.num_bytes <= self._limit_bytes:
                self._kept[number] = row
                self.num_bytes += row.num_bytes
        fresh |= read
        return [fresh[n] if n in fresh else self._kept[n] for n in numbers]

    def _read(self, number: int) -> TaughtRow | None:
        if self._files is None:
            return None
        row, device, last = self._rows[number], self._teacher.device, self._teacher.spec.num_layers - 1
        found = self._files.get(row.id, taps=(*self._taps, last))
        if found is None:
            return None
        found = found[: len(row.token_ids)].to(device, self._teacher.dtype)
        hidden = self._teacher.final_norm(found[row.prompt_len :, -self._teacher.spec.hidden_size :])
        short = len(row.token_ids) - len(found)
        hidden = functional.pad(hidden, (0, 0, 0, short))
        return TaughtRow(found[:, : -self._teacher.spec.hidden_size], hidden, None, row.prompt_len)

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(row.num_bytes for row in self._kept.values()), "kept features are miscounted"
        assert self.num_bytes <= self._limit_bytes, "more features are kept than allowed"


@dataclass(frozen=True, slots=True, eq=False)
class _Padded:
    """places: [R, S] flat token of each position (padding repeats the last). flat: [T] into R * S."""

    places: Tensor
    flat: Tensor
    cos: Tensor
    sin: Tensor


class _CausalRows:
    """Attention of whole rows to themselves, without a cache: right-padded, so that the causal mask is all."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, rope: RopeTable) -> None:
        self._spec, self._rope = spec, rope
        self._norms = [
            None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
            for layer in weights.layers
        ]

    def plan(self, batch: ForwardBatch) -> _Padded:
        sizes = torch.tensor([part.num_tokens for part in batch.slices])
        longest = int(sizes.max())
        starts = sizes.cumsum(0) - sizes
        offsets = torch.arange(longest)
        places = starts[:, None] + torch.minimum(offsets, sizes[:, None] - 1)
        flat = (offsets < sizes[:, None]).flatten().nonzero().squeeze(1)
        positions = (flat % longest).to(batch.token_ids.device)
        cos, sin = self._rope.cos[positions].unsqueeze(1), self._rope.sin[positions].unsqueeze(1)
        return _Padded(places.to(batch.token_ids.device), flat.to(batch.token_ids.device), cos, sin)

    def attend(self, layer: int, qkv: Tensor, plan: _Padded) -> Tensor:
        spec, norms = self._spec, self._norms[layer]
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if norms is not None:
            q, k = (
                functional.rms_norm(x.float(), (spec.head_dim,), None, spec.norm_eps).to(qkv.dtype) * norm
                for x, norm in ((q, norms[0]), (k, norms[1]))
            )
        q, k = _rotated(q, plan), _rotated(k, plan)
        q, k, v = (x[plan.places].transpose(1, 2) for x in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)[plan.flat].flatten(1)


def _rotated(x: Tensor, plan: _Padded) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * plan.cos - high * plan.sin, high * plan.cos + low * plan.sin), dim=-1)


def _parts(rows: Sequence[TokenRow], max_tokens: int) -> list[list[TokenRow]]:
    """Rows in order, in groups of at most ``max_tokens`` (a longer row alone)."""
    parts: list[list[TokenRow]] = []
    size = 0
    for row in rows:
        if not parts or size + len(row.token_ids) > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(row.token_ids)
    return parts
