"""Reads drafter checkpoints of both layouts, checks that they fit the target, and writes the DeepSpec layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dspark_batch.drafters.dspark.backbone import backbone_shapes
from dspark_batch.drafters.dspark.confidence_head import confidence_shapes
from dspark_batch.drafters.dspark.config import DSparkConfig, deepspec_fields, dspark_config
from dspark_batch.drafters.dspark.markov_head import markov_shapes
from dspark_batch.drafters.dspark.target_parts import TargetParts
from dspark_batch.errors import ModelError
from dspark_batch.provenance import atomic_write_bytes, atomic_write_text

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_TO_TARGET, _IN_DRAFT = "d2t", "t2d"
_CONFIDENCE_BIAS = "confidence_head.proj.bias"
_NUM_COMPARED_ROWS = 32
_MAX_RELATIVE_DISTANCE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class DrafterWeights:
    """A drafter's own tensors under their DeepSpec names, without the target's embedding and head.

    ``lm_head.weight`` [Vd, H] is among them only for a reduced vocabulary whose checkpoint brings its own. token_ids:
    [Vd] int64, the target's token of each draft token; None without a reduced vocabulary.
    """

    config: DSparkConfig
    tensors: Mapping[str, Tensor]
    token_ids: Tensor | None = None


def read_config(folder: Path) -> DSparkConfig:
    """The config of the drafter in ``folder``.

    Raises:
        ModelError: the file is missing, unreadable or senseless.
        UnsupportedModelError: the drafter has a feature that is not computed.
    """
    file = folder / CONFIG_FILE
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"the drafter's {file} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"the drafter's {file} must hold a mapping, got {type(fields).__name__}")
    return dspark_config(fields, where=str(file))


def expected_shapes(config: DSparkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a drafter needs, its copies of the target's tensors left out."""
    return backbone_shapes(config) | markov_shapes(config) | confidence_shapes(config)


def load_checkpoint(folder: Path, parts: TargetParts) -> DrafterWeights:
    """Read a drafter for the target of ``parts``, onto its device and in its dtype.

    Raises:
        ModelError: the checkpoint is unreadable, incomplete or made for another target; the message names every
            mismatch that was found.
        UnsupportedModelError: the drafter has a feature that is not computed.
    """
    config = read_config(folder)
    with ExitStack() as stack:
        files = _TensorFiles(folder, stack)
        problems = [*_misfits(config, parts), *files.problems(config)]
        token_ids = None
        if not problems:
            token_ids, found = _draft_vocabulary(config, files)
            problems = [*found, *_copies_that_differ(config, files, parts)]
        if problems:
            raise ModelError(f"the drafter in {folder} cannot draft for this target: {'; '.join(problems)}")
        names = [name for name in expected_shapes(config) if name in files.shapes]
        if config.is_reduced and HEAD in files.shapes:
            names.append(HEAD)
        tensors = {name: files.tensor(name).to(device=parts.device, dtype=parts.dtype) for name in names}
    return DrafterWeights(config, tensors, None if token_ids is None else token_ids.to(parts.device))


def save_checkpoint(
    folder: Path,
    config: DSparkConfig,
    tensors: Mapping[str, Tensor],
    *,
    token_ids: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a drafter in the DeepSpec layout; the folder is made if need be. The weights come before the config.

    tensors: all of :func:`expected_shapes`; ``embed_tokens.weight`` and ``lm_head.weight`` too where other engines are
    to load it, which do not share the target's. token_ids: [Vd], increasing, for a reduced vocabulary; stored as the
    ``d2t`` and ``t2d`` of the speculators layout.

    Raises:
        ValueError: tensors are missing, unknown or of a wrong shape.
        OSError: the files cannot be written.
    """
    wanted = expected_shapes(config)
    optional = _optional_shapes(config)
    wrong = [
        f"{name}: {list(tensors[name].shape) if name in tensors else 'missing'}, not {list(shape)}"
        for name, shape in {**wanted, **{n: s for n, s in optional.items() if n in tensors}}.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    wrong += [f"{name}: unknown" for name in sorted(tensors.keys() - wanted.keys() - {EMBEDDING, HEAD})]
    if config.is_reduced != (token_ids is not None):
        wrong.append("token_ids must be given for a reduced vocabulary, and only then")
    if wrong:
        raise ValueError(f"not a complete drafter for its config: {'; '.join(wrong)}")
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if token_ids is not None:
        ids = token_ids.to("cpu", torch.int64)
        stored[_TO_TARGET] = ids - torch.arange(ids.shape[0])
        stored[_IN_DRAFT] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    fields = {**deepspec_fields(config), "dtype": str(dtype).removeprefix("torch.")}
    atomic_write_bytes(folder / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    atomic_write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _optional_shapes(config: DSparkConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint may hold beside those it must hold."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        HEAD: (config.draft_vocab_size, config.hidden_size),
    }
    if config.is_reduced:
        shapes |= {_TO_TARGET: (config.draft_vocab_size,), _IN_DRAFT: (config.vocab_size,)}
    return shapes


def _misfits(config: DSparkConfig, parts: TargetParts) -> list[str]:
    """How the config contradicts the target."""
    problems = []
    for name, ours, theirs in (
        ("vocab_size", config.vocab_size, parts.vocab_size),
        ("hidden_size", config.hidden_size, parts.hidden_size),
        ("num_target_layers", config.num_target_layers, parts.num_layers),
        ("target_fingerprint", config.target_fingerprint, parts.fingerprint),
    ):
        if ours is not None and ours != theirs:
            problems.append(f"{name} is {ours}, the target has {theirs}")
    last = parts.num_layers - 1
    outside = [tap for tap in config.taps if not -1 <= tap < last]
    if outside:
        problems.append(
            f"tapped layers {outside} are not among -1 .. {last - 1} (the output of the last layer is never tapped)"
        )
    return problems


def _draft_vocabulary(config: DSparkConfig, files: _TensorFiles) -> tuple[Tensor | None, list[str]]:
    """[Vd] target token ids of a reduced vocabulary, and what is wrong with it."""
    if not config.is_reduced:
        return None, []
    ids = files.tensor(_TO_TARGET).long() + torch.arange(config.draft_vocab_size)
    problems = []
    if bool((ids < 0).any()) or bool((ids >= config.vocab_size).any()) or len(set(ids.tolist())) != len(ids):
        problems.append(f"{_TO_TARGET} maps draft tokens outside the target's vocabulary or two of them to one token")
    elif _IN_DRAFT in files.shapes:
        listed = files.tensor(_IN_DRAFT).bool().nonzero().squeeze(-1)
        if not torch.equal(listed, ids.sort().values):
            problems.append(f"{_TO_TARGET} and {_IN_DRAFT} name different draft vocabularies")
    return ids, problems


def _copies_that_differ(config: DSparkConfig, files: _TensorFiles, parts: TargetParts) -> list[str]:
    """Copies of the target's tensors that are another model's. A few rows tell; rounding and fine-tuning pass."""
    problems = []
    index = torch.linspace(0, config.vocab_size - 1, min(_NUM_COMPARED_ROWS, config.vocab_size)).long()
    if EMBEDDING in files.shapes:
        ours = files.rows(EMBEDDING, index).double()
        theirs = parts.embed(index.to(parts.device)).double().cpu()
        problems += _distance_problem(EMBEDDING, ours, theirs)
    if HEAD in files.shapes and not config.is_reduced:
        probe = torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(0))
        ours = probe.double() @ files.rows(HEAD, index).double().T
        theirs = parts.logits(probe.to(parts.device, parts.dtype)).double().cpu()[:, index]
        problems += _distance_problem(HEAD, ours, theirs)
    return problems


def _distance_problem(name: str, ours: Tensor, theirs: Tensor) -> list[str]:
    distance = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
    if distance <= _MAX_RELATIVE_DISTANCE:
        return []
    return [f"{name} is not the target's (relative distance {distance:.2g} over {_NUM_COMPARED_ROWS} rows)"]


class _TensorFiles:
    """The safetensors files of a folder as one namespace, read on demand. shapes: by tensor name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} cannot be read as safetensors: {error}; fetch it again") from error
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                self._handles[name] = handle
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self._handles[name].get_tensor(name)
        return value

    def rows(self, name: str, index: Tensor) -> Tensor:
        piece = self._handles[name].get_slice(name)
        return torch.cat([piece[i : i + 1] for i in index.tolist()])

    def problems(self, config: DSparkConfig) -> list[str]:
        """Missing, unexpected and mis-shaped tensors."""
        wanted = expected_shapes(config)
        optional = _optional_shapes(config)
        needed = wanted.keys() - {_CONFIDENCE_BIAS} | ({_TO_TARGET} if config.is_reduced else set())
        known = wanted | optional
        found = [f"tensor {name} is missing" for name in sorted(needed - self.shapes.keys())]
        found += [f"tensor {name} is unexpected" for name in sorted(self.shapes.keys() - known.keys())]
        found += [
            f"tensor {name} is {list(self.shapes[name])}, not {list(known[name])}"
            for name in sorted(self.shapes.keys() & known.keys())
            if self.shapes[name] != known[name]
        ]
        return found


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS_FILE, folder / f"{WEIGHTS_FILE}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"{folder} has neither {single.name} nor {index.name}; drafters are read from safetensors only"
        )
    try:
        names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}; fetch the drafter again") from error
    return [folder / name for name in names]
