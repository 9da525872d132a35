"""From settings to parts: the drafter and the verification rule, each imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.dspark.embedded import embedded_drafter
from dspark_batch.drafters.hybrid import HybridDrafter
from dspark_batch.drafters.ngram import DEFAULT_DRAFT_TOKENS, NgramDrafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.engine.config import DrafterName, EngineConfig
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.sampling.streams import rejection_uniforms
from dspark_batch.tensors import Target
from dspark_batch.verification.base import Verifier
from dspark_batch.verification.coupled import CoupledVerifier

AUTO_DRAFTER: DrafterName = "suffix"
"""Where no drafter ships for the target: needs no checkpoint, and finds what ngram finds in the row itself and more in
the rows before it."""

_DRAFTERS = {
    "suffix": ("dspark_batch.drafters.suffix", "SuffixDrafter"),
    "draft_model": ("dspark_batch.drafters.draft_model", "DraftModelDrafter"),
}
_VERIFIERS = {
    "token": ("dspark_batch.verification.token", "TokenVerifier"),
    "block": ("dspark_batch.verification.block", "BlockVerifier"),
}


def make_drafter(config: EngineConfig, target: Target, *, target_fingerprint: str) -> Drafter:
    """The drafter of ``config``. Beyond ngram and none, the class is built by its
    ``from_config(config, target, target_fingerprint=...)``.

    Raises:
        ConfigError: this version does not have the drafter, or it lacks its checkpoint.
        ModelError: the drafter's checkpoint cannot be used with this target.
    """
    name = "none" if config.schedule == "off" else config.drafter
    path = Path(config.drafter_path) if config.drafter_path else None
    if path is None and name in ("auto", "dspark", "hybrid"):
        path = embedded_drafter(target_fingerprint)
    if name == "auto":
        name = AUTO_DRAFTER if path is None else "dspark"
    if name == "none":
        return NoDrafter()
    if name == "ngram":
        return NgramDrafter(max_draft_tokens=config.max_draft_tokens or DEFAULT_DRAFT_TOKENS)
    if name in ("draft_model", "dspark", "hybrid") and path is None:
        raise ConfigError([Problem("speculation.path", f"is not set, and drafter {name!r} needs a checkpoint")])
    if name in ("dspark", "hybrid"):
        block = _dspark(path, target, target_fingerprint, shared_noise=config.verification == "coupled")
        if name == "dspark":
            return block
        suffix = _load(*_DRAFTERS["suffix"], field="speculation.drafter", value=name)
        lookup = suffix.from_config(config, target, target_fingerprint=target_fingerprint)
        return HybridDrafter(lookup, block)
    found = _load(*_DRAFTERS[name], field="speculation.drafter", value=name)
    return cast(Drafter, found.from_config(config, target, target_fingerprint=target_fingerprint))


def _dspark(path: Path | None, target: Target, target_fingerprint: str, *, shared_noise: bool) -> Drafter:
    """The drafter shares the target's embedding and head, so only a loaded model can have one."""
    from dspark_batch.drafters.dspark.drafter import DSparkDrafter
    from dspark_batch.models.draft_parts import RunnerParts
    from dspark_batch.models.runner import TargetRunner

    if not isinstance(target, TargetRunner):
        raise ConfigError([Problem("speculation.drafter", f"'dspark' cannot draft for a {type(target).__name__}")])
    assert path is not None, "checked by the caller"
    parts = RunnerParts(target, fingerprint=target_fingerprint)
    return DSparkDrafter.load(str(path), parts, shared_noise=shared_noise)


def make_verifier(config: EngineConfig) -> Verifier:
    """The verification rule of ``config``.

    Raises:
        ConfigError: this version does not have the rule.
    """
    if config.verification == "coupled":
        return CoupledVerifier()
    found = _load(*_VERIFIERS[config.verification], field="speculation.verification", value=config.verification)
    return cast(Verifier, found(rejection_uniforms))


def _load(module: str, name: str, *, field: str, value: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ConfigError([Problem(field, f"{value!r} is not part of this version; choose another")]) from error
