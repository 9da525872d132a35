"""Which files the input is made of, on any pyarrow filesystem, or at one version of a table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from dspark_batch.batch.hive import Constants, partition_of
from dspark_batch.batch.ranges import COMPRESSIONS
from dspark_batch.batch.working_copy import content_checksum, copy_root
from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection

FileFormat = Literal["parquet", "jsonl", "csv", "arrow"]
TEXT_FORMATS: tuple[FileFormat, ...] = ("jsonl", "csv")
SUFFIXES: dict[FileFormat, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "arrow": (".arrow", ".feather", ".ipc"),
}
READABLE: dict[FileFormat, tuple[str, ...]] = SUFFIXES | {
    name: tuple(f"{suffix}{end}" for suffix in SUFFIXES[name] for end in ("", *COMPRESSIONS)) for name in TEXT_FORMATS
}
OTHER_COMPRESSIONS = (".xz", ".lz4", ".br", ".snappy", ".zip", ".7z", ".tar", ".tgz")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file. ``path`` is a path in its filesystem; ``relative`` names the file in row ids and messages."""

    path: str
    relative: str
    size_bytes: int
    mtime_ns: int | None
    constants: Constants = ()
    """Columns that are not in the file, with their one value as text: those of the path or of the table's log."""
    checksum: str | None = None
    """SHA-256 of the content, for files whose modification time says nothing (see ``working_copy``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFiles:
    """The files of an input, sorted by path, all of one format.

    ``version`` and ``schema`` are set for tables: the Delta version or Iceberg snapshot, and the table's columns.
    """

    filesystem: fs.FileSystem
    format: FileFormat
    files: tuple[InputFile, ...]
    version: int | None = None
    schema: pa.Schema | None = None


def find_input_files(
    section: InputSection, *, filesystem: fs.FileSystem | None = None, version: int | None = None
) -> InputFiles:
    """The files of the input as it is now, or, for tables, at ``version`` (default: the configured one, or the newest).

    Raises InputError where there are none, and where a library for the format is not installed.
    """
    pinned = version if version is not None else section.version
    if section.format == "delta":
        from dspark_batch.batch.delta import delta_files

        return delta_files(section, version=pinned)
    if section.format == "iceberg":
        from dspark_batch.batch.iceberg import iceberg_files

        return iceberg_files(section, snapshot_id=pinned)
    if section.format == "huggingface" or (section.format is None and is_dataset_folder(section)):
        return dataset_files(section, filesystem=filesystem)
    return _plain_files(section, filesystem=filesystem)


def _plain_files(section: InputSection, *, filesystem: fs.FileSystem | None) -> InputFiles:
    """Resolve ``input.path``: files, folders (searched to the bottom), globs (``*``, ``?``, ``[..]``, ``**``), lists.

    Names beginning with ``_`` or ``.`` are skipped in folders and globs, and in folders also files with the suffix of
    no known format; compressed files of a known one are read or refused. Folders named ``key=value`` become columns.
    ``relative`` is the path below the deepest folder that the configured paths share before their first wildcard, so
    it depends on the config and not on which other files there are.

    Raises:
        InputError: nothing matches, a path does not exist, formats are mixed or not recognised, or a folder holds
            files whose compression cannot be read.
    """
    entries = [section.path] if isinstance(section.path, str) else list(section.path)
    if not entries:
        raise InputError("input.path is an empty list; name at least one file, folder or glob")
    opened = [open_input(entry, filesystem) for entry in entries]
    used = opened[0][0]
    if any(not other.equals(used) for other, _ in opened):
        raise InputError(f"input.path mixes filesystems: {', '.join(entries)}; use one per run")
    infos: dict[str, fs.FileInfo] = {}
    bases: list[str] = []
    for entry, (_, inner) in zip(entries, opened, strict=True):
        base, found = _expand(used, inner, entry=entry, format=_file_format(section))
        bases.append(base)
        infos |= {info.path: info for info in found}
    common = os.path.commonpath(bases) if len(set(bases)) > 1 else bases[0]
    files = tuple(_input_file(used, infos[path], below=common) for path in sorted(infos))
    return InputFiles(filesystem=used, format=_file_format(section) or _infer_format(files), files=files)


def _input_file(filesystem: fs.FileSystem, info: fs.FileInfo, *, below: str) -> InputFile:
    relative = info.path.removeprefix(below).lstrip("/")
    is_copy = isinstance(filesystem, fs.LocalFileSystem) and copy_root(info.path) is not None
    try:
        checksum = content_checksum(filesystem, info.path) if is_copy else None
    except OSError as error:
        raise InputError(f"{info.path}: cannot be read: {error}") from error
    return InputFile(
        path=info.path,
        relative=relative,
        size_bytes=info.size,
        mtime_ns=None if is_copy else info.mtime_ns,
        constants=partition_of(relative),
        checksum=checksum,
    )


def _file_format(section: InputSection) -> FileFormat | None:
    for name in SUFFIXES:
        if section.format == name:
            return name
    return None


def open_input_filesystem(section: InputSection) -> fs.FileSystem:
    """The filesystem that ``input.path`` lives on. Raises InputError."""
    if section.format == "iceberg":
        from dspark_batch.batch.iceberg import iceberg_filesystem

        return iceberg_filesystem(section)
    first = section.path if isinstance(section.path, str) else section.path[0]
    return open_input(first)[0]


def open_input(entry: str, filesystem: fs.FileSystem | None = None) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it, which may hold wildcards. Raises InputError."""
    if filesystem is not None:
        return filesystem, entry.rstrip("/")
    if "://" not in entry:
        return fs.LocalFileSystem(), str(Path(entry).expanduser().absolute())
    path, options = _split_options(entry)
    head, wildcard, tail = re.match(r"([^*?\[]*)([*?\[]?)(.*)", path, re.DOTALL).groups()  # type: ignore[union-attr]
    fixed, _, partial = head.rpartition("/") if wildcard else (head, "", "")
    try:
        found, inner = fs.FileSystem.from_uri(f"{fixed}{options}")
    except (OSError, ValueError) as error:
        raise InputError(f"input.path {entry!r}: no filesystem for it: {error}") from error
    inner = inner.rstrip("/")
    return found, f"{inner}/{partial}{wildcard}{tail}" if wildcard else inner


def is_dataset_folder(section: InputSection) -> bool:
    """Whether the one path is a folder that the ``datasets`` library saved."""
    if not isinstance(section.path, str) or re.search(r"[*?\[]", _split_options(section.path)[0]):
        return False
    used, folder = open_input(section.path)
    names = [f"{folder}/state.json", f"{folder}/dataset_dict.json"]
    try:
        return any(info.type == fs.FileType.File for info in used.get_file_info(names))
    except OSError as error:
        raise InputError(f"input.path {section.path!r}: {error}") from error


def dataset_files(section: InputSection, *, filesystem: fs.FileSystem | None = None) -> InputFiles:
    """The Arrow files of a folder saved by the ``datasets`` library (``save_to_disk``), in the order of its rows.

    Raises InputError for a folder of several splits, and for rows that were selected or shuffled without being written.
    """
    assert isinstance(section.path, str)
    used, folder = open_input(section.path, filesystem)
    try:
        if used.get_file_info(f"{folder}/dataset_dict.json").type == fs.FileType.File:
            splits = json.loads(_read(used, f"{folder}/dataset_dict.json"))["splits"]
            raise InputError(
                f"{section.path} holds the splits {', '.join(splits)}; set input.path to one of them, "
                f"such as {section.path}/{splits[0]}"
            )
        state = json.loads(_read(used, f"{folder}/state.json"))
        names = [entry["filename"] for entry in state["_data_files"]]
        infos = used.get_file_info([f"{folder}/{name}" for name in names])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{section.path}: not a folder that datasets.save_to_disk wrote: {error!r}") from error
    if state.get("_indices_files"):
        raise InputError(f"{section.path}: its rows are a selection; write them with flatten_indices() first")
    missing = [info.path for info in infos if info.type != fs.FileType.File]
    if missing:
        raise InputError(f"{section.path}: state.json names files that are not there: {', '.join(missing)}")
    return InputFiles(
        filesystem=used, format="arrow", files=tuple(_input_file(used, info, below=folder) for info in infos)
    )


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _split_options(uri: str) -> tuple[str, str]:
    """Path and query of a URI. A query is ``?name=value...``; any other question mark is a wildcard."""
    match = re.search(r"\?\w+=[^/*]*(&\w+=[^/*]*)*$", uri)
    return (uri, "") if match is None else (uri[: match.start()], match.group())


def _expand(
    filesystem: fs.FileSystem, path: str, *, entry: str, format: FileFormat | None
) -> tuple[str, list[fs.FileInfo]]:
    """The folder that relative names start from, and the files."""
    try:
        if re.search(r"[*?\[]", path):
            return _expand_glob(filesystem, path, entry=entry)
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            return path.rpartition("/")[0], [info]
        if info.type == fs.FileType.NotFound:
            raise InputError(f"input.path {entry!r}: no such file or folder")
        formats = [format] if format else list(SUFFIXES)
        suffixes = tuple(suffix for name in formats for suffix in READABLE[name])
        files = _visible(filesystem, path)
    except OSError as error:
        raise InputError(f"input.path {entry!r}: {error}") from error
    plain = tuple(suffix for name in formats for suffix in SUFFIXES[name])
    _refuse_unreadable([file.path for file in files if not file.path.lower().endswith(suffixes)], suffixes=plain)
    found = [file for file in files if file.path.lower().endswith(suffixes)]
    if not found:
        raise InputError(f"input.path {entry!r}: the folder has no file ending in {', '.join(plain)}")
    return path, found


def _refuse_unreadable(paths: Sequence[str], *, suffixes: tuple[str, ...]) -> None:
    """Raise InputError for files of a known format that are compressed in a way in which they cannot be read."""
    ends = tuple(f"{suffix}{end}" for suffix in suffixes for end in (*COMPRESSIONS, *OTHER_COMPRESSIONS))
    refused = [path for path in paths if path.lower().endswith(ends)]
    if refused:
        raise InputError(
            "compressed files that cannot be read as they are:\n  "
            + "\n  ".join(refused)
            + f"\ndecompress them; JSON lines and CSV may be compressed as {', '.join(COMPRESSIONS)}"
        )


def _expand_glob(filesystem: fs.FileSystem, path: str, *, entry: str) -> tuple[str, list[fs.FileInfo]]:
    fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
    pattern = re.compile(_glob_regex(path.removeprefix(fixed).lstrip("/")))
    found = [
        file
        for file in _visible(filesystem, fixed or "/")
        if pattern.fullmatch(file.path.removeprefix(fixed).lstrip("/"))
    ]
    if not found:
        raise InputError(f"input.path {entry!r}: no file matches")
    return fixed, found


def _visible(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [
        info
        for info in infos
        if info.type == fs.FileType.File
        and not any(part.startswith(("_", ".")) for part in info.path.removeprefix(folder).split("/"))
    ]


def _glob_regex(pattern: str) -> str:
    pieces = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(piece)
        or (f"[{piece[1:-1].replace('!', '^', 1)}]" if len(piece) > 1 and piece[0] == "[" else re.escape(piece))
        for piece in pieces
    )


def _infer_format(files: Sequence[InputFile]) -> FileFormat:
    found: dict[FileFormat, str] = {}
    for file in files:
        known = [name for name, suffixes in READABLE.items() if file.path.lower().endswith(suffixes)]
        if not known:
            raise InputError(f"{file.path}: the format cannot be told from the name; set input.format")
        found.setdefault(known[0], file.path)
    if len(found) > 1:
        raise InputError(f"input.path mixes formats: {' and '.join(found.values())}; use one per run")
    return next(iter(found))
