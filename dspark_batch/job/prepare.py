"""Everything that can be known before a model is loaded: config, input, columns, fingerprint, what is left to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.errors import ConfigError, ModelError, OutputError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.job.loader import absolute_paths, load_config
from dspark_batch.job.outcome import Totals

if TYPE_CHECKING:
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.planning import ResolvedPlan
    from dspark_batch.batch.shards import Plan, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A run that passed every check. Nothing has been written yet. Paths in ``config`` are absolute."""

    config: JobConfig
    store: RunStore
    plan: Plan
    resolved: ResolvedPlan
    fields: Mapping[str, object]
    fingerprint: str
    engine_factory: str | None
    lease_epoch: int
    """Which lease on the output was the last when the run looked at it."""

    @property
    def has_saved_plan(self) -> bool:
        return self.resolved.is_saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """Which shards a run still has to do, the entries that stand, and the totals of those that need no more work."""

    shards: tuple[Shard, ...]
    committed: Mapping[str, ManifestEntry]
    totals: Totals

    @property
    def num_rows(self) -> int:
        """Rows to generate; before the filter in shards that nobody has read yet."""
        return sum(
            self.committed[shard.name].stats.num_retryable_rows if shard.name in self.committed else shard.num_rows
            for shard in self.shards
        )


def prepare(
    config: ConfigLike, *, overrides: Sequence[str] = (), retry_failed: bool = False, may_finish_swap: bool = False
) -> PreparedRun:
    """Load and check a job. Loads neither torch, Ray nor Spark, and writes nothing.

    ``may_finish_swap``: do write where an earlier run was interrupted while it took the place of an old output.

    Raises:
        ConfigError: the config, or a column, template or filter in it, or the model's name is wrong, or the output path
            is no folder that can be written.
        InputError: the input cannot be read, or changed since the run began.
        FingerprintMismatchError: the output path holds a run with other settings.
    """
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.engines import configured_factory
    from dspark_batch.batch.fingerprint import fingerprint_fields
    from dspark_batch.batch.lease import current_epoch
    from dspark_batch.batch.planning import plan_input, resolve_plan
    from dspark_batch.provenance import fingerprint

    written = load_config(config, overrides=overrides)
    if retry_failed:
        written = _resuming(written)
    _check_backend(written)
    _refuse_vanishing_output(written)
    config = absolute_paths(written)
    factory = configured_factory()
    weights = _weights_identity(config, factory)
    store = RunStore(config.output.path, mode=config.output.mode, format=config.output.format)
    _check_output_folder(store)
    epoch = current_epoch(store.store)
    if store.is_swapping():
        _finish_swap(store, config, may_write=may_finish_swap)
    try:
        resolved = resolve_plan(
            config,
            run=store,
            fields_of=lambda digest: fingerprint_fields(written, weights_fingerprint=weights, input_digest=digest),
            retry_failed=retry_failed,
        )
    except OutputError:
        # What is wrong with the config itself comes first.
        check_columns(config, plan_input(config))
        raise
    check_columns(config, resolved.plan)
    return PreparedRun(
        config=config,
        store=store,
        plan=resolved.plan,
        resolved=resolved,
        fields=resolved.fields,
        fingerprint=fingerprint(resolved.fields),
        engine_factory=factory,
        lease_epoch=epoch,
    )


def remaining(run: PreparedRun, *, retry_failed: bool = False, verify: bool = False) -> Remaining:
    """What is left of a run: shards without a commit and, with ``retry_failed``, those with rows worth another try.

    ``verify`` compares the checksum of every output file instead of its size and modification time.
    """
    store = run.store.join(run.fingerprint)
    committed = {} if run.resolved.begins_anew else store.committed(verify_checksums=verify)
    todo = tuple(
        shard
        for shard in run.plan.shards
        if shard.name not in committed or (retry_failed and committed[shard.name].stats.num_retryable_rows)
    )
    open_names = {shard.name for shard in todo}
    totals = Totals()
    for shard in run.plan.shards:
        if shard.name not in open_names:
            totals.add(committed[shard.name].stats, shard=shard.name)
    return Remaining(shards=todo, committed=committed, totals=totals)


def _resuming(config: JobConfig) -> JobConfig:
    return config.model_copy(update={"output": config.output.model_copy(update={"mode": "resume"})})


def _check_backend(config: JobConfig) -> None:
    for backend, library, name in (("ray", "ray", "Ray"), ("spark", "pyspark", "Spark")):
        if config.engine.backend == backend and find_spec(library) is None:
            message = f"{backend!r} needs {name}, which is not installed; run: pip install 'dspark-batch[{backend}]'"
            raise ConfigError([Problem("engine.backend", f"{message}, or use local")])


def _refuse_vanishing_output(config: JobConfig) -> None:
    from dspark_batch.batch.working_copy import copy_root

    path = config.output.path
    if "://" in path or os.path.isabs(path) or copy_root(str(Path.cwd())) is None:
        return
    message = (
        f"{path!r} is relative, and the working directory of this Ray job is a temporary copy ({Path.cwd()}); "
        "give an absolute path or a URI"
    )
    raise ConfigError([Problem("output.path", message)])


def _check_output_folder(store: RunStore) -> None:
    """Raise ConfigError where a local output is known to fail: a file is in its way, or its folder is read-only."""
    if not store.store.is_local:
        return
    place = Path(store.store.root)
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        message = f"{str(place)!r} is a file, not a folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        message = f"the folder {str(place)!r} is not writable"
    else:
        return
    if str(place) != store.store.root:
        message = f"{store.store.root!r} cannot be made: {message}"
    raise ConfigError([Problem("output.path", message)])


def _weights_identity(config: JobConfig, factory: str | None) -> str:
    if factory is not None:
        return f"{factory} {config.model.target}"
    from dspark_batch.models.sources import resolve_source, weights_fingerprint

    try:
        return weights_fingerprint(resolve_source(config.model.target, revision=config.model.revision))
    except ModelError as error:
        raise ConfigError([Problem("model.target", str(error))]) from error


def check_columns(config: JobConfig, plan: Plan) -> None:
    """Raises ConfigError for everything in the config that does not fit the input's columns."""
    from dspark_batch.batch.reader import columns_to_read
    from dspark_batch.batch.worker import check_schema

    problems: list[Problem] = []
    try:
        check_schema(config, input_schema=plan.schema)
    except ConfigError as error:
        problems += error.problems
    try:
        columns_to_read(config, schema=plan.schema)
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem.field == "input.filter"]
    if problems:
        raise ConfigError(problems)


def _finish_swap(store: RunStore, config: JobConfig, *, may_write: bool) -> None:
    from dspark_batch.batch.lease import acquire_lease
    from dspark_batch.batch.swap import finish_swap

    if not may_write:
        raise OutputError(
            f"{config.output.path}: a run was interrupted while it took the place of the old output; run the job to "
            "finish that"
        )
    with acquire_lease(store.store, run_id=store.run_id, on_conflict=config.output.on_conflict):
        finish_swap(store.store)
