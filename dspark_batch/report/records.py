"""What the output folder of a run says of it: manifest, the lines of its processes, the records of its engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.errors import ConfigError, OutputError, Problem

if TYPE_CHECKING:
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.store import Store
    from dspark_batch.batch.work import EngineWork


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """A run as far as it has come.

    ``starts``: the lines of ``metrics.jsonl``, one per process that came to an end of its own. ``config``: the run's
    ``run.yaml``. ``is_overwriting``: it is to take the place of the output, which it has not yet.
    """

    path: str
    fingerprint: str
    config: Mapping[str, Any]
    entries: Sequence[ManifestEntry]
    engines: Sequence[EngineWork]
    """By the time at which they began."""
    starts: Sequence[Mapping[str, Any]]
    num_open_shards: int
    """Shards of the plan that are not committed."""
    is_finished: bool
    is_overwriting: bool


def read_run(path: str, *, meta: str | None = None) -> RunRecords:
    """The run of an output folder or URI; the one under way where it is to overwrite another. Changes nothing.

    ``meta``: where the state of the run lies in the folder, if that is known.

    Raises:
        ConfigError: the folder holds no run.
        OutputError: it cannot be read, or what it says is damaged.
    """
    from dspark_batch.batch.commit import FINGERPRINT_FILE
    from dspark_batch.batch.layout import META, NEXT, SUCCESS, SWAP
    from dspark_batch.batch.store import Store

    store = Store(path)
    if store.is_local and Path(store.root).is_file():
        message = f"{path!r} is a file, not the folder of a run; give the output.path of a run"
        raise ConfigError([Problem("OUTPUT_PATH", message, "command line")])
    if store.stat(SWAP) is not None:
        raise OutputError(
            f"{path}: a run was interrupted while it took the place of the old output; run the job to finish that"
        )
    found = store.read_all([f"{place}/{FINGERPRINT_FILE}" for place in ((NEXT, META) if meta is None else (meta,))])
    if not found:
        message = f"{path!r} holds no run: there is no {META}/{FINGERPRINT_FILE}; give the output.path of a run"
        raise ConfigError([Problem("OUTPUT_PATH", message, "command line")])
    name, text = next(iter(found.items()))
    meta = name.removesuffix(f"/{FINGERPRINT_FILE}")
    fingerprint = str(json.loads(text).get("fingerprint", ""))
    entries = _entries(store, meta, fingerprint=fingerprint)
    return RunRecords(
        path=path,
        fingerprint=fingerprint,
        config=_config(store, meta),
        entries=entries,
        engines=_engines(store, meta),
        starts=_starts(store, meta),
        num_open_shards=_num_open_shards(store, meta, committed={entry.shard for entry in entries}),
        is_finished=meta == META and store.stat(SUCCESS) is not None,
        is_overwriting=meta == NEXT,
    )


def _entries(store: Store, meta: str, *, fingerprint: str) -> list[ManifestEntry]:
    from dspark_batch.batch.manifest import ManifestEntry

    found = _files(store, f"{meta}/manifest").items()
    entries = [ManifestEntry.from_json(text, source=f"{store.root}/{name}") for name, text in found]
    return [entry for entry in entries if entry.fingerprint == fingerprint]


def _engines(store: Store, meta: str) -> list[EngineWork]:
    from dspark_batch.batch.work import WORK, EngineWork

    found = _files(store, f"{meta}/{WORK}").items()
    engines = [EngineWork.from_json(text, source=f"{store.root}/{name}") for name, text in found]
    return sorted(engines, key=lambda engine: engine.begin_s)


def _files(store: Store, folder: str) -> dict[str, bytes]:
    return store.read_all([name for name in sorted(store.files(folder)) if name.endswith(".json")])


def _config(store: Store, meta: str) -> Mapping[str, Any]:
    import yaml

    text = store.read(f"{meta}/run.yaml")
    try:
        values = None if text is None else yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OutputError(f"{store.root}/{meta}/run.yaml cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _starts(store: Store, meta: str) -> list[Mapping[str, Any]]:
    name = f"{meta}/metrics.jsonl"
    text = store.read(name)
    try:
        return [json.loads(line) for line in (text or b"").decode().splitlines()]
    except ValueError as error:
        raise OutputError(f"{store.root}/{name} cannot be read: {error}") from error


def _num_open_shards(store: Store, meta: str, *, committed: set[str]) -> int:
    from dspark_batch.batch.planning import PLAN_FILE
    from dspark_batch.batch.shards import Plan

    name = f"{meta}/{PLAN_FILE}"
    text = store.read(name)
    if text is None:
        return 0
    plan = Plan.from_json(text.decode(), source=f"{store.root}/{name}")
    return sum(shard.name not in committed for shard in plan.shards)
