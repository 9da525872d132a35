"""``output.mode: overwrite``: the new run grows beside the old one and takes its place at the end, by one small file.

Until ``swap.json`` stands, the old output is untouched. It names the new run's shards; from that moment the new run is
the output, and what remains to move is moved, by this process or by whichever opens the folder next. Each step can be
repeated. Table formats have no files to move, only the state.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

from dspark_batch.batch.layout import META, NEXT, SHARD_FILE, STAGING, SUCCESS, SWAP
from dspark_batch.batch.store import Store

FILES = f"{NEXT}/files"
KEPT = ("swap.json", "lock", "lease/", "next/", "staging/")
"""What a swap leaves in ``_dspark``: it belongs to the folder, not to a run."""


def begin_swap(store: Store, *, files: Sequence[str] | None) -> None:
    """Make the run in ``_dspark/next`` the output, with these shard files, in this order.

    ``files`` is None for table formats, whose files stay where they are.
    """
    state = [name.removeprefix(f"{NEXT}/") for name in sorted(store.files(NEXT, recursive=True))]
    values = {"files": files, "state": [name for name in state if not name.startswith("files/")]}
    staging = f"{STAGING}/swap.{uuid.uuid4().hex[:8]}.tmp"
    store.write(SWAP, json.dumps(values, indent=1).encode(), staging=staging)


def finish_swap(store: Store) -> bool:
    """Carry out a swap that was begun, from wherever it stopped; whether there was one."""
    text = store.read(SWAP)
    if text is None:
        return False
    values = json.loads(text)
    files: list[str] | None = values["files"]
    state: list[str] = values["state"]
    store.delete(SUCCESS)
    _remove_old(store, files=files, state=set(state))
    for file in files or ():
        store.move(f"{FILES}/{file}", file)
    for name in state:
        store.move(f"{NEXT}/{name}", f"{META}/{name}")
    for name in store.files(NEXT, recursive=True):
        store.delete(name)
    store.delete(SWAP)
    return True


def swapping_files(store: Store) -> list[str] | None:
    """Where the files of the new run lie while a swap is under way, in the order of its shards; None without a swap."""
    text = store.read(SWAP)
    files: list[str] | None = None if text is None else json.loads(text)["files"]
    if files is None:
        return None
    waiting = store.files(FILES)
    return [f"{FILES}/{file}" if f"{FILES}/{file}" in waiting else file for file in files]


def _remove_old(store: Store, *, files: Sequence[str] | None, state: set[str]) -> None:
    """Entries before the files that they name. What the new run has too is replaced by its move instead."""
    names = [name.removeprefix(f"{META}/") for name in store.files(META, recursive=True)]
    old = [name for name in names if name not in state and not name.startswith(KEPT)]
    for name in sorted(old, key=lambda name: (not name.startswith("manifest/"), name)):
        store.delete(f"{META}/{name}")
    if files is not None:
        for name in sorted(set(store.files()) - set(files)):
            if SHARD_FILE.fullmatch(name):
                store.delete(name)
