"""The plan of a run: its input files, fixed, and cut into shards, the same way every time."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dspark_batch.batch.cursors import END, RowGroup
from dspark_batch.batch.cut import CutFile, Piece, cut_file, unify
from dspark_batch.batch.hive import Constants, constant_fields
from dspark_batch.batch.pruning import Pruner
from dspark_batch.batch.sources import FileFormat, InputFile, InputFiles, find_input_files
from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection

PLAN_VERSION = 2

Identity = tuple[int, int | str | None]
"""What a file still has as long as its content is the same: its size, and its modification time or checksum."""


class StalePlanError(InputError):
    """A saved plan cannot be gone on with: it is not readable, or the input is not the one that it was made over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A slice of one input file that is committed as one. Plain values only, so that it travels anywhere.

    Rows ``row_start`` to ``row_stop`` of the file, before any filter; for text formats also the bytes that hold them
    (of a compressed file, of what it holds).
    ``names`` are the columns of the file, for CSV and where there are ``constants`` beside them. ``keep`` tells which
    rows are to be done where not all are: a base64 text of packed bits. ``num_rows`` counts the rows to be done.
    ``identity`` is that of the file when it was planned; None for the files of tables, which are never rewritten.
    """

    name: str
    format: FileFormat
    path: str
    relative: str
    row_start: int
    row_stop: int
    num_rows: int
    byte_start: int | None = None
    byte_stop: int | None = None
    names: tuple[str, ...] = ()
    constants: Constants = ()
    keep: str | None = None
    identity: Identity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Files, shards and schema (of all input columns) of a run. ``num_rows`` counts them before the filter.

    ``version`` is the table version that was read, for tables. An incremental run has a plan for each ``increment``
    (from 1): ``files`` are then all files that were ever planned, ``first_index`` is the number of the first shard, and
    ``id_files`` name the lists of row ids that have been planned.
    """

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    schema: pa.Schema
    version: int | None = None
    increment: int = 1
    first_index: int = 0
    id_files: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def next_index(self) -> int:
        """The number of the next shard into the same output."""
        last = [int(shard.name.split("-")[1]) for shard in self.shards[-1:]]
        return last[0] + 1 if last else self.first_index

    @property
    def digest(self) -> str:
        """Identity of the input's content, by names, sizes and modification times or checksums (SHA-256, hex)."""
        facts: list[object] = [(file.relative, *identity_of(file)) for file in self.files]
        facts += [] if self.version is None else [self.version]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> str:
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        values = {
            "version": PLAN_VERSION,
            "files": [asdict(file) for file in self.files],
            "shards": [asdict(shard) for shard in self.shards],
            "schema": schema,
            "table_version": self.version,
            "increment": self.increment,
            "first_index": self.first_index,
            "id_files": self.id_files,
        }
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Plan:
        """Raises StalePlanError where the text is not a plan of this version."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != PLAN_VERSION:
                raise ValueError(f"version {values['version']}, expected {PLAN_VERSION}")
            return cls(
                files=tuple(InputFile(**_with_tuples(file)) for file in values["files"]),
                shards=tuple(Shard(**_with_tuples(shard)) for shard in values["shards"]),
                schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"]))),
                version=values["table_version"],
                increment=values["increment"],
                first_index=values["first_index"],
                id_files=tuple(values["id_files"]),
            )
        except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise StalePlanError(
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
    if saved is not None:
        plan = Plan.from_json(saved, source="the saved plan")
        check_unchanged(plan, find_input_files(section, filesystem=filesystem, version=plan.version).files)
        return plan
    found = find_input_files(section, filesystem=filesystem)
    return cut_files(found, max_rows=max_rows, delimiter=section.delimiter, filter=section.filter, limit=section.limit)


def cut_files(
    found: InputFiles,
    *,
    max_rows: int,
    delimiter: str = ",",
    first_index: int = 0,
    schema: pa.Schema | None = None,
    filter: str | None = None,
    limit: int | None = None,
) -> Plan:
    """The plan over the first ``limit`` rows of these files, in their order, with shard numbers from ``first_index``.

    ``schema`` is that of an earlier plan into the same output, which the files must fit. Shards of which ``filter``
    drops every row, as folder names or the statistics in Parquet footers tell, are left out; one always stays, so that
    there is an output. Files after the last row are not read. Raises InputError.
    """
    left = END if limit is None else limit
    whole = found.schema if found.schema is not None else schema
    shards: list[Shard] = []
    columns: dict[str, list[str]] = {}
    for file in found.files:
        if not left:
            break
        cut = cut_file(found.filesystem, file, format=found.format, max_rows=max_rows, delimiter=delimiter, limit=left)
        left -= cut.num_rows
        columns[file.path] = cut.schema.names
        if len(set(cut.schema.names)) != len(cut.schema.names):
            raise InputError(f"{file.path}: a column name occurs more than once: {', '.join(cut.schema.names)}")
        if found.schema is None:
            before = [] if whole is None else [whole]
            whole = unify(before, cut.schema, file=file.path, format=found.format)
        shards += [
            _named(file, piece, cut=cut, found=found, index=first_index + len(shards) + place)
            for place, piece in enumerate(cut.pieces)
        ]
    assert whole is not None, "an input has at least one file"
    if schema is not None and not schema.equals(whole):
        raise InputError(
            f"the new files change the columns of this output from\n{schema}\nto\n{whole}\nuse another output.path"
        )
    if found.schema is None and schema is None:
        extra = constant_fields(file.constants for file in found.files)
        whole = pa.schema([*whole, *(field for field in extra if field.name not in whole.names)])
    pruner = Pruner(filter, schema=whole)
    kept = _not_pruned(shards, pruner, columns=columns, filesystem=found.filesystem) if pruner.can_prune else shards
    return Plan(files=found.files, shards=tuple(kept), schema=whole, version=found.version, first_index=first_index)


def identity_of(file: InputFile) -> Identity:
    """The identity of a file as it was found."""
    return file.size_bytes, file.mtime_ns if file.checksum is None else file.checksum


def check_unchanged(plan: Plan, files: Sequence[InputFile]) -> None:
    """Raise StalePlanError naming the files that were added, removed or changed since the plan was made."""
    before = {file.path: file for file in plan.files}
    now = {file.path: file for file in files}
    changes = [f"missing: {path}" for path in sorted(before.keys() - now.keys())]
    changes += [f"added: {path}" for path in sorted(now.keys() - before.keys())]
    changes += [
        f"changed: {path} ({facts(identity_of(before[path]))} then, {facts(identity_of(now[path]))} now)"
        for path in sorted(before.keys() & now.keys())
        if identity_of(before[path]) != identity_of(now[path])
    ]
    if changes:
        raise StalePlanError(
            "the input is not the one that this run began with:\n  "
            + "\n  ".join(changes)
            + "\nrestore it, or begin a new run (another output.path, or output.mode=overwrite)"
        )


def facts(identity: Identity) -> str:
    """An identity as messages show it."""
    size_bytes, mark = identity
    if isinstance(mark, str):
        return f"{size_bytes} bytes, SHA-256 {mark[:12]}"
    return f"{size_bytes} bytes, modified {mark} ns"


def _not_pruned(
    shards: Sequence[Shard], pruner: Pruner, *, columns: Mapping[str, Sequence[str]], filesystem: fs.FileSystem
) -> Sequence[Shard]:
    """The shards with rows that may pass the filter, or the first where none has."""
    kept: list[Shard] = []
    for path, of_file in groupby(shards, key=lambda shard: shard.path):
        pieces = list(of_file)
        if not pruner.may_match(pieces[0].constants, stored=columns[path]):
            continue
        if pieces[0].format == "parquet":
            try:
                groups = pruner.row_groups(filesystem, path)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{path}: cannot be read as Parquet: {error}") from error
            pieces = [shard for shard in pieces if any(_overlap(shard, group) for group in groups)]
        kept += pieces
    return kept or shards[:1]


def _overlap(shard: Shard, group: RowGroup) -> bool:
    return max(shard.row_start, group.row_start) < min(shard.row_stop, group.row_stop)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists back to tuples, as JSON knows none."""
    return {
        name: tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if isinstance(value, list)
        else value
        for name, value in values.items()
    }


def _named(file: InputFile, piece: Piece, *, cut: CutFile, found: InputFiles, index: int) -> Shard:
    """The name says the shard's place in the plan and pins its file and row range."""
    place = f"{file.relative}:{piece.row_start}:{piece.row_stop - piece.row_start}"
    short = hashlib.sha256(place.encode()).hexdigest()[:8]
    return Shard(
        name=f"part-{index:05d}-{short}",
        format=found.format,
        path=file.path,
        relative=file.relative,
        row_start=piece.row_start,
        row_stop=piece.row_stop,
        num_rows=piece.row_stop - piece.row_start,
        byte_start=piece.byte_start,
        byte_stop=piece.byte_stop,
        names=cut.names or (tuple(cut.schema.names) if file.constants else ()),
        constants=file.constants,
        identity=identity_of(file) if found.version is None else None,
    )
