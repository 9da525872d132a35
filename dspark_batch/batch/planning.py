"""Which plan a start of a run works on: a new one, the saved one, or, for incremental runs, what has come since."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dspark_batch.batch.commit import RunStore, parquet_bytes
from dspark_batch.batch.filters import parse_filter
from dspark_batch.batch.layout import STAGING
from dspark_batch.batch.publication import check_target
from dspark_batch.batch.reader import ShardReader, pack_bits
from dspark_batch.batch.rows import check_id_column, row_ids
from dspark_batch.batch.shards import Plan, Shard, StalePlanError, check_unchanged, cut_files, identity_of
from dspark_batch.batch.sources import InputFile, InputFiles, find_input_files
from dspark_batch.batch.working_copy import copy_root, moved_plan
from dspark_batch.errors import FingerprintMismatchError, InputError
from dspark_batch.job.config import JobConfig
from dspark_batch.provenance import fingerprint

PLAN_FILE = "plan.json"
FINISHED_FILE = "finished.json"
IDS = "ids"
ARCHIVE = "plans"

FieldsOf = Callable[[str | None], Mapping[str, object]]
"""The fingerprint fields of the run for an input digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPlan:
    """A plan, the fingerprint fields of its run, and what ``save`` has to write before the first shard.

    ``begins_anew``: in place of an overwrite that did not end and cannot be gone on with; nothing of that counts.
    """

    plan: Plan
    fields: Mapping[str, object]
    is_saved: bool
    begins_anew: bool = False
    archived: Plan | None = None
    new_ids: pa.Array[Any] | None = None

    def save(self, run: RunStore) -> None:
        """Write the plan, and first what it refers to. Nothing where it is saved already. Raises OutputError."""
        if self.is_saved:
            return
        if self.archived is not None:
            run.write_meta(f"{ARCHIVE}/{self.archived.increment:06d}.json", self.archived.to_json())
        if self.new_ids is not None:
            name = f"{run.ticket.meta}/{IDS}/{self.plan.id_files[-1]}"
            data = parquet_bytes(pa.table({"id": self.new_ids}))
            run.store.write(name, data, staging=f"{STAGING}/ids.{run.run_id}.tmp")
        run.write_meta(PLAN_FILE, self.plan.to_json())


def resolve_plan(config: JobConfig, *, run: RunStore, fields_of: FieldsOf, retry_failed: bool = False) -> ResolvedPlan:
    """The plan for this start. Reads the output folder and the input, and writes nothing.

    Raises:
        FingerprintMismatchError, OutputError: the output holds a run with other settings or of another table version,
            or mode is error and a run is there.
        InputError: the input cannot be read, or is not the one that the run began with.
    """
    text = run.read_meta(PLAN_FILE)
    if text is None:
        return _first_plan(config, run=run, fields_of=fields_of)
    try:
        return _resumed(text, config, run=run, fields_of=fields_of, retry_failed=retry_failed)
    except (StalePlanError, FingerprintMismatchError):
        if config.output.mode != "overwrite":
            raise
    return replace(_first_plan(config, run=run, fields_of=fields_of), begins_anew=True)


def _resumed(text: str, config: JobConfig, *, run: RunStore, fields_of: FieldsOf, retry_failed: bool) -> ResolvedPlan:
    root = _working_copy(config)
    saved = moved_plan(Plan.from_json(text, source=f"{run.path}/{run.ticket.meta}/{PLAN_FILE}"), root=root)
    incremental = config.input.incremental
    fields = fields_of(None if incremental else saved.digest)
    run.compare_unfinished(fields)
    if incremental is None:
        _check_version(config, run=run, saved=saved)
        check_unchanged(saved, find_input_files(config.input, version=saved.version).files)
        return ResolvedPlan(plan=saved, fields=fields, is_saved=True)
    if retry_failed:
        return ResolvedPlan(plan=moved_plan(_all_increments(run, saved), root=root), fields=fields, is_saved=True)
    return _next_increment(config, run=run, saved=saved, fields=fields)


def _check_version(config: JobConfig, *, run: RunStore, saved: Plan) -> None:
    if config.input.version not in (None, saved.version):
        raise FingerprintMismatchError(
            f"{run.path} holds a run of another version of the input:\n"
            f"  input.version: {saved.version} there, {config.input.version} here\n"
            "choose another output.path, restore this setting, or use output.mode=overwrite"
        )


def _working_copy(config: JobConfig) -> str | None:
    """The unpacked working directory of a Ray job that the input lies in, if it does."""
    paths = [config.input.path] if isinstance(config.input.path, str) else config.input.path
    roots = [root for path in paths if (root := copy_root(path)) is not None]
    return roots[0] if roots else None


def is_finished(run: RunStore, plan: Plan) -> bool:
    """Whether the plan's run came to its end: everything committed, published and swapped."""
    text = run.read_meta(FINISHED_FILE)
    return text is not None and int(json.loads(text)["increment"]) >= plan.increment


def mark_finished(run: RunStore, plan: Plan) -> None:
    """Note the end of the plan's run. Raises OutputError."""
    run.write_meta(FINISHED_FILE, json.dumps({"increment": plan.increment}) + "\n")


def plan_input(config: JobConfig) -> Plan:
    """The whole input, or its first rows, cut into shards. Raises InputError where it cannot be read."""
    found = find_input_files(config.input)
    section = config.input
    return cut_files(
        found, max_rows=config.shards.rows, delimiter=section.delimiter, filter=section.filter, limit=section.limit
    )


def _first_plan(config: JobConfig, *, run: RunStore, fields_of: FieldsOf) -> ResolvedPlan:
    plan = plan_input(config)
    fields = fields_of(None if config.input.incremental else plan.digest)
    run.compare(fields)
    check_target(run, config, plan_schema=plan.schema)
    if config.input.incremental != "rows" or check_id_column(config.input.id, schema=plan.schema):
        return ResolvedPlan(plan=plan, fields=fields, is_saved=False)
    return _only_new_rows(config, ResolvedPlan(plan=plan, fields=fields, is_saved=False), seen=[])


def _next_increment(config: JobConfig, *, run: RunStore, saved: Plan, fields: Mapping[str, object]) -> ResolvedPlan:
    """The saved plan with the files that have come since: as a new increment where the saved one is finished."""
    found = find_input_files(config.input)
    lost = _lost_shards(run.join(fingerprint(fields)), saved, found) if config.input.incremental == "rows" else set()
    # Rows of lost shards may stand in files that were read before.
    before = () if lost else saved.files
    known = {(file.path, *identity_of(file)) for file in before}
    new = [file for file in found.files if (file.path, *identity_of(file)) not in known]
    if not new:
        return ResolvedPlan(plan=saved, fields=fields, is_saved=True)
    if config.input.incremental == "files":
        _refuse_changed(saved, new)
    check_target(run, config, plan_schema=saved.schema)
    added = cut_files(
        replace(found, files=tuple(new)),
        max_rows=config.shards.rows,
        delimiter=config.input.delimiter,
        first_index=saved.next_index,
        schema=saved.schema,
        filter=config.input.filter,
    )
    resolved = ResolvedPlan(plan=replace(added, id_files=saved.id_files), fields=fields, is_saved=False)
    if config.input.incremental == "rows":
        resolved = _only_unseen_rows(config, resolved, run=run, saved=saved, lost=lost)
    kept = replace(saved, shards=tuple(shard for shard in saved.shards if shard.name not in lost))
    added = replace(resolved.plan, files=(*before, *new))
    if is_finished(run, saved):
        if not added.shards:
            return replace(resolved, plan=replace(kept, files=added.files, id_files=added.id_files))
        return replace(resolved, plan=replace(added, increment=saved.increment + 1), archived=kept)
    plan = replace(
        added, shards=(*kept.shards, *added.shards), increment=saved.increment, first_index=saved.first_index
    )
    return replace(resolved, plan=plan)


def _lost_shards(run: RunStore, saved: Plan, found: InputFiles) -> set[str]:
    """Names of the shards that are not committed and whose file has changed or gone: they cannot be made any more."""
    now = {file.path: identity_of(file) for file in found.files}
    stale = {
        shard.name for shard in saved.shards if shard.path not in now or shard.identity not in (None, now[shard.path])
    }
    return stale - run.committed().keys() if stale else stale


def _only_unseen_rows(
    config: JobConfig, resolved: ResolvedPlan, *, run: RunStore, saved: Plan, lost: Collection[str]
) -> ResolvedPlan:
    """As ``_only_new_rows``, after the saved plan. Rows of lost shards are new again, and leave the lists of ids."""
    seen = _seen_ids(run, saved)
    if not lost:
        return _only_new_rows(config, resolved, seen=seen)
    seen = [_without_rows_of(lost, saved, ids=pa.concat_arrays(seen))]
    resolved = _only_new_rows(config, resolved, seen=seen)
    assert resolved.new_ids is not None
    plan = replace(resolved.plan, id_files=resolved.plan.id_files[-1:])
    return replace(resolved, plan=plan, new_ids=pa.concat_arrays([*seen, resolved.new_ids]))


def _without_rows_of(lost: Collection[str], saved: Plan, *, ids: pa.Array[Any]) -> pa.Array[Any]:
    """The ids without those of some shards of the saved plan. Its ids, in the order of its shards, are the last."""
    keep = np.ones(len(ids), dtype=np.bool_)
    start = len(ids) - saved.num_rows
    for shard in saved.shards:
        keep[start : start + shard.num_rows] = shard.name not in lost
        start += shard.num_rows
    return ids.filter(pa.array(keep))


def _only_new_rows(config: JobConfig, resolved: ResolvedPlan, *, seen: Sequence[pa.Array[Any]]) -> ResolvedPlan:
    """The plan with those rows alone whose id was in no plan before, and of equal ids the first.

    Rows that the filter drops stay unseen.
    """
    assert config.input.id is not None
    plan = resolved.plan
    columns = {config.input.id}
    if config.input.filter is not None:
        columns.update(parse_filter(config.input.filter, schema=plan.schema)[1])
    reader = ShardReader(config, plan_schema=plan.schema, columns=sorted(columns))
    places: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    parts: list[pa.Array[Any]] = []
    for shard in plan.shards:
        table, index = reader.read_rows(shard)
        ids = row_ids(table, id_column=config.input.id, relative_file=shard.relative, row_index=index)
        places.append(np.asarray(index, dtype=np.int64) - shard.row_start)
        parts.append(pa.array(ids, pa.large_string()))
    reader.close()
    ids_now = pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())
    is_new = _is_first(ids_now)
    if seen:
        is_new &= ~np.asarray(pc.is_in(ids_now, value_set=pa.concat_arrays(list(seen))))
    shards: list[Shard] = []
    start = 0
    for shard, place in zip(plan.shards, places, strict=True):
        fresh = is_new[start : start + len(place)]
        start += len(place)
        shards += _with_rows(shard, place[fresh])
    new_ids = ids_now.filter(pa.array(is_new))
    last = int(plan.id_files[-1].removesuffix(".parquet")) if plan.id_files else 0
    names = (*plan.id_files, f"{last + 1:06d}.parquet")
    return replace(resolved, plan=replace(plan, shards=tuple(shards), id_files=names), new_ids=new_ids)


def _is_first(ids: pa.Array[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    codes = np.asarray(ids.dictionary_encode().indices)
    first = np.zeros(len(ids), dtype=np.bool_)
    first[np.unique(codes, return_index=True)[1]] = True
    return first


def _with_rows(shard: Shard, rows: np.ndarray[Any, np.dtype[np.int64]]) -> list[Shard]:
    num_all = shard.row_stop - shard.row_start
    if len(rows) == num_all:
        return [shard]
    if len(rows) == 0:
        return []
    keep = np.zeros(num_all, dtype=np.bool_)
    keep[rows] = True
    return [replace(shard, keep=pack_bits(keep), num_rows=len(rows))]


def _seen_ids(run: RunStore, plan: Plan) -> list[pa.Array[Any]]:
    found: list[pa.Array[Any]] = []
    for name in plan.id_files:
        data = run.store.read(f"{run.ticket.meta}/{IDS}/{name}")
        if data is None:
            raise InputError(
                f"{run.path}/{run.ticket.meta}/{IDS}/{name} is missing, and says which rows earlier runs had; "
                "restore it, or begin a new output"
            )
        found += pq.read_table(pa.BufferReader(data)).column("id").chunks
    return found


def _all_increments(run: RunStore, current: Plan) -> Plan:
    names = [name for name in sorted(run.store.files(f"{run.ticket.meta}/{ARCHIVE}")) if name.endswith(".json")]
    before = [Plan.from_json(data.decode(), source=name) for name, data in run.store.read_all(names).items()]
    earlier = [plan for plan in before if plan.increment < current.increment]
    return replace(current, shards=tuple(shard for plan in [*earlier, current] for shard in plan.shards))


def _refuse_changed(saved: Plan, new: Sequence[InputFile]) -> None:
    before = {file.path for file in saved.files}
    changed = [file.path for file in new if file.path in before]
    if changed:
        raise StalePlanError(
            "files that earlier runs had have changed since:\n  "
            + "\n  ".join(changed)
            + "\ninput.incremental=files takes each file once: give new data new files, or use input.incremental=rows"
        )
