"""What all engines of a run have in common, whichever machines they are on: one dtype and one set of weights."""

from __future__ import annotations

import json
import platform

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.contract import RowEngine, WeighedEngine
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, OutputError, Problem

ENGINE_FILE = "engine.json"
NUM_SHOWN = 16
"""Characters of a fingerprint in a message."""


def with_agreed_dtype(config: EngineConfig, *, run: RunStore) -> EngineConfig:
    """The config with the dtype that the run's first engine took; this one notes its own where it is the first.

    An ``auto`` that each machine resolved for itself would mix rows of two dtypes in one output. The kind of
    the first engine's device is noted for information. Raises ModelError and OutputError.
    """
    text = run.read_meta(ENGINE_FILE) or run.claim_meta(ENGINE_FILE, json.dumps(_resolved(config), indent=1) + "\n")
    try:
        return EngineConfig.model_validate(config.model_dump() | {"dtype": json.loads(text)["dtype"]})
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{run.path}/{run.ticket.meta}/{ENGINE_FILE} does not name the dtype of this run: {error}; restore it, or "
            "use output.mode=overwrite"
        ) from error


def check_weights(engine: RowEngine, *, expected: str, config: EngineConfig) -> None:
    """Raise ConfigError where the engine has other weights than the run began with. ``expected``: their fingerprint."""
    if not isinstance(engine, WeighedEngine) or engine.target_fingerprint == expected:
        return
    message = (
        f"{config.target!r} on {platform.node()} has the files {engine.target_fingerprint[:NUM_SHOWN]}, and this run "
        f"was begun with {expected[:NUM_SHOWN]}; give every machine the same folder, or name the commit of a hub model "
        "in model.revision"
    )
    raise ConfigError([Problem("model.target", message)])


def _resolved(config: EngineConfig) -> dict[str, object]:
    from dspark_batch.models.loader import resolve_device, resolve_dtype

    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    return {"dtype": dtype, "device": device.type}
