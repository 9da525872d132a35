"""The plan of a run: its input files, fixed, and cut into shards, the same way every time."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.jsonl import cut_lines, inferred_schema, parse_lines
from dspark_batch.batch.sources import InputFile, InputFiles, InputFormat, find_input_files
from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A slice of one input file that is committed as one. Plain values only, so that it travels anywhere.

    Rows ``row_start`` to ``row_start + num_rows`` of the file, before any filter; for JSONL also the bytes that hold
    them.
    """

    name: str
    format: InputFormat
    path: str
    relative: str
    row_start: int
    num_rows: int
    byte_start: int | None = None
    byte_stop: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Files, shards and schema (of all input columns) of a run. ``num_rows`` counts rows before any filter."""

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """Identity of the input's content, by names, sizes and modification times (SHA-256, hex)."""
        facts = [(file.relative, file.size_bytes, file.mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> str:
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        values = {
            "version": PLAN_VERSION,
            "files": [asdict(file) for file in self.files],
            "shards": [asdict(shard) for shard in self.shards],
            "schema": schema,
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Plan:
        """Raises InputError where the text is not a plan of this version."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != PLAN_VERSION:
                raise ValueError(f"version {values['version']}, expected {PLAN_VERSION}")
            return cls(
                files=tuple(InputFile(**file) for file in values["files"]),
                shards=tuple(Shard(**shard) for shard in values["shards"]),
                schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"]))),
            )
        except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise InputError(
                f"{source} is not a plan that can be resumed: {error}; use output.mode=overwrite"
            ) from error


def make_plan(
    section: InputSection, *, max_rows: int, saved: str | None = None, filesystem: fs.FileSystem | None = None
) -> Plan:
    """Find the input files and cut them into shards of at most ``max_rows`` rows; or take up a saved plan.

    Parquet files are cut between row groups where that gives shards of the right size, and within a row group that is
    too large. A saved plan (its JSON) is used as it is, also under another ``max_rows``.

    Raises:
        InputError: no files, a file cannot be read, schemas do not fit together, or files were added, removed or
            changed since the plan was saved.
    """
    found = find_input_files(section, filesystem=filesystem)
    if saved is not None:
        plan = Plan.from_json(saved, source="the saved plan")
        check_unchanged(plan, found.files)
        return plan
    schemas: list[pa.Schema] = []
    shards: list[Shard] = []
    for file in found.files:
        cut = _parquet_shards if found.format == "parquet" else _jsonl_shards
        schema, pieces = cut(found, file, max_rows=max_rows)
        schemas.append(_unified(schemas[-1:], schema, file=file, format=found.format))
        shards += [_named(piece, index=len(shards) + place) for place, piece in enumerate(pieces)]
    schema = schemas[-1]
    if len(set(schema.names)) != len(schema.names):
        raise InputError(f"column names occur more than once: {', '.join(sorted(schema.names))}; rename them")
    return Plan(files=found.files, shards=tuple(shards), schema=schema)


def check_unchanged(plan: Plan, files: Sequence[InputFile]) -> None:
    """Raise InputError naming the files that were added, removed or changed since the plan was made."""
    before = {file.path: file for file in plan.files}
    now = {file.path: file for file in files}
    changes = [f"missing: {path}" for path in sorted(before.keys() - now.keys())]
    changes += [f"added: {path}" for path in sorted(now.keys() - before.keys())]
    changes += [
        f"changed: {path} ({_facts(before[path])} then, {_facts(now[path])} now)"
        for path in sorted(before.keys() & now.keys())
        if _facts(before[path]) != _facts(now[path])
    ]
    if changes:
        raise InputError(
            "the input is not the one that this run began with:\n  "
            + "\n  ".join(changes)
            + "\nrestore it, or begin a new run (another output.path, or output.mode=overwrite)"
        )


def _facts(file: InputFile) -> str:
    return f"{file.size_bytes} bytes, modified {file.mtime_ns} ns"


def _parquet_shards(found: InputFiles, file: InputFile, *, max_rows: int) -> tuple[pa.Schema, list[Shard]]:
    try:
        with found.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow.remove_metadata()
            groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path}: cannot be read as Parquet: {error}") from error
    ranges = cut_groups(groups, max_rows=max_rows)
    return schema, [
        Shard(name="", format="parquet", path=file.path, relative=file.relative, row_start=start, num_rows=stop - start)
        for start, stop in ranges
    ]


def cut_groups(group_rows: Sequence[int], *, max_rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of at most ``max_rows`` rows over row groups, as few as possible and about equal.

    A cut moves to the nearest end of a row group where one lies within a quarter of a range.
    """
    ends = np.cumsum(np.asarray(group_rows, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    start = 0
    while start < total:
        left = total - start
        size = -(-left // -(-left // max_rows))
        stop = start + size
        place = int(np.searchsorted(ends, stop))
        near = [int(end) for end in ends[max(place - 1, 0) : place + 1]]
        near = [end for end in near if abs(end - stop) <= size // 4 and start < end <= start + max_rows]
        stop = min(near, key=lambda end: (abs(end - stop), end)) if near else stop
        yield start, stop
        start = stop


def _jsonl_shards(found: InputFiles, file: InputFile, *, max_rows: int) -> tuple[pa.Schema, list[Shard]]:
    schema = pa.schema([])
    shards: list[Shard] = []
    try:
        with found.filesystem.open_input_stream(file.path, compression=None) as stream:
            for lines in cut_lines(stream, max_rows=max_rows):
                table = parse_lines(lines.data, schema=None, file=file.path, row_start=lines.row_start)
                schema = _unified([schema], inferred_schema(table, file=file.path), file=file, format="jsonl")
                shard = Shard(
                    name="",
                    format="jsonl",
                    path=file.path,
                    relative=file.relative,
                    row_start=lines.row_start,
                    num_rows=lines.num_rows,
                    byte_start=lines.byte_start,
                    byte_stop=lines.byte_stop,
                )
                shards.append(shard)
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error}") from error
    return schema, shards


def _unified(before: Sequence[pa.Schema], schema: pa.Schema, *, file: InputFile, format: InputFormat) -> pa.Schema:
    try:
        return pa.unify_schemas([*before, schema], promote_options="permissive" if format == "jsonl" else "default")
    except pa.ArrowException as error:
        raise InputError(f"{file.path}: its columns do not fit those of the rows before it: {error}") from error


def _named(shard: Shard, *, index: int) -> Shard:
    """The name says the shard's place in the plan and pins its file and row range."""
    place = f"{shard.relative}:{shard.row_start}:{shard.num_rows}"
    short = hashlib.sha256(place.encode()).hexdigest()[:8]
    return Shard(**{**asdict(shard), "name": f"part-{index:05d}-{short}"})
