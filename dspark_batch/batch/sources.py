"""Which files the input is made of, on any pyarrow filesystem."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyarrow import fs

from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection

InputFormat = Literal["parquet", "jsonl"]
SUFFIXES: dict[InputFormat, tuple[str, ...]] = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json")}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file. ``path`` is a path in its filesystem; ``relative`` names the file in row ids and messages."""

    path: str
    relative: str
    size_bytes: int
    mtime_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFiles:
    """The files of an input, sorted by path, all of one format."""

    filesystem: fs.FileSystem
    format: InputFormat
    files: tuple[InputFile, ...]


def find_input_files(section: InputSection, *, filesystem: fs.FileSystem | None = None) -> InputFiles:
    """Resolve ``input.path``: files, folders (searched to the bottom), globs (``*``, ``?``, ``[..]``, ``**``), lists.

    Names beginning with ``_`` or ``.`` are skipped in folders and globs, and in folders also files with the suffix of
    no known format. ``relative`` is the path below the deepest folder that the configured paths share before their
    first wildcard, so it depends on the config and not on which other files there are.

    Raises:
        InputError: nothing matches, a path does not exist, formats are mixed or not recognised.
    """
    entries = [section.path] if isinstance(section.path, str) else list(section.path)
    if not entries:
        raise InputError("input.path is an empty list; name at least one file, folder or glob")
    opened = [_open(entry, filesystem) for entry in entries]
    used = opened[0][0]
    if any(not other.equals(used) for other, _ in opened):
        raise InputError(f"input.path mixes filesystems: {', '.join(entries)}; use one per run")
    infos: dict[str, fs.FileInfo] = {}
    bases: list[str] = []
    for entry, (_, inner) in zip(entries, opened, strict=True):
        base, found = _expand(used, inner, entry=entry, format=section.format)
        bases.append(base)
        infos |= {info.path: info for info in found}
    common = os.path.commonpath(bases) if len(set(bases)) > 1 else bases[0]
    files = tuple(
        InputFile(
            path=path,
            relative=path.removeprefix(common).lstrip("/"),
            size_bytes=infos[path].size,
            mtime_ns=infos[path].mtime_ns,
        )
        for path in sorted(infos)
    )
    return InputFiles(filesystem=used, format=section.format or _infer_format(files), files=files)


def open_input_filesystem(section: InputSection) -> fs.FileSystem:
    """The filesystem that ``input.path`` lives on. Raises InputError."""
    first = section.path if isinstance(section.path, str) else section.path[0]
    return _open(first, None)[0]


def _open(entry: str, filesystem: fs.FileSystem | None) -> tuple[fs.FileSystem, str]:
    if filesystem is not None:
        return filesystem, entry.rstrip("/")
    if "://" not in entry:
        return fs.LocalFileSystem(), str(Path(entry).expanduser().absolute())
    head, wildcard, tail = re.match(r"([^*?\[]*)([*?\[]?)(.*)", entry, re.DOTALL).groups()  # type: ignore[union-attr]
    fixed, _, partial = head.rpartition("/") if wildcard else (head, "", "")
    try:
        found, inner = fs.FileSystem.from_uri(fixed)
    except (OSError, ValueError) as error:
        raise InputError(f"input.path {entry!r}: no filesystem for it: {error}") from error
    inner = inner.rstrip("/")
    return found, f"{inner}/{partial}{wildcard}{tail}" if wildcard else inner


def _expand(
    filesystem: fs.FileSystem, path: str, *, entry: str, format: InputFormat | None
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
        suffixes = SUFFIXES[format] if format else tuple(suffix for known in SUFFIXES.values() for suffix in known)
        found = [file for file in _visible(filesystem, path) if file.path.lower().endswith(suffixes)]
    except OSError as error:
        raise InputError(f"input.path {entry!r}: {error}") from error
    if not found:
        raise InputError(f"input.path {entry!r}: the folder has no file ending in {', '.join(suffixes)}")
    return path, found


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


def _infer_format(files: Sequence[InputFile]) -> InputFormat:
    found: dict[InputFormat, str] = {}
    for file in files:
        known = [name for name, suffixes in SUFFIXES.items() if file.path.lower().endswith(suffixes)]
        if not known:
            raise InputError(f"{file.path}: the format cannot be told from the name; set input.format")
        found.setdefault(known[0], file.path)
    if len(found) > 1:
        raise InputError(f"input.path mixes formats: {' and '.join(found.values())}; use one per run")
    return next(iter(found))
