"""Inputs that came with a Ray job: ``ray job submit --working-dir`` unpacks a copy of the folder on every node.

Where the copy lies and when its files were written changes from one submission to the next, so the files in it are
known by their content, and a saved plan is moved to where the copy is now.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pyarrow import fs

if TYPE_CHECKING:
    from dspark_batch.batch.shards import Plan

WORKING_DIRS = "working_dir_files"
"""Folder of Ray's session into which working directories are unpacked, each below a name of its own."""

_COPY = re.compile(rf"(.*/{WORKING_DIRS}/[^/]+)(?=/|$)")
READ_BYTES = 1 << 20


def copy_root(path: str) -> str | None:
    """The unpacked working directory that a local path lies in, or None."""
    match = _COPY.match(path)
    return None if match is None else match.group(1)


def content_checksum(filesystem: fs.FileSystem, path: str) -> str:
    """SHA-256 (hex) of a file. Raises OSError."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def moved_plan(plan: Plan, *, root: str | None) -> Plan:
    """The plan with the files of an earlier copy at their places in the copy ``root``; as it is where there is none."""
    if root is None or all(copy_root(file.path) in (None, root) for file in plan.files):
        return plan
    return replace(
        plan,
        files=tuple(replace(file, path=_moved(file.path, root)) for file in plan.files),
        shards=tuple(replace(shard, path=_moved(shard.path, root)) for shard in plan.shards),
    )


def _moved(path: str, root: str) -> str:
    before = copy_root(path)
    return path if before is None else root + path.removeprefix(before)
