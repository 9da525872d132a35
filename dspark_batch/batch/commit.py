"""The output folder of a run. A shard is committed when its manifest entry stands; everything else is swept.

Layout: ``<shard>.parquet``, ``_SUCCESS``, and in ``_dspark/``: ``plan.json``, ``run.yaml``, ``fingerprint.json``,
``engine.json``, ``metrics.jsonl``, ``report.html``, ``work/<engine>.json``, ``manifest/<shard>.json``,
``staging/<shard>.<run>.<attempt>.tmp``, and ``empty.parquet`` where there are no rows. A run that overwrites another
keeps all of this below ``_dspark/next`` until its end (``swap.py``). Runs into a table format keep their files in
``data-<uid>/``, since older versions of the table go on to name them.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.layout import LOCK, META, NEXT, SHARD_FILE, STAGING, SUCCESS, SWAP, RunTicket
from dspark_batch.batch.lease import SETTLE_S, Lease, check_epoch
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.store import Store, StoredFile
from dspark_batch.batch.swap import finish_swap, swapping_files
from dspark_batch.errors import FingerprintMismatchError, OutputError
from dspark_batch.job.config import OutputFormat, OutputMode
from dspark_batch.provenance import differences, fingerprint, versions

FINGERPRINT_FILE = "fingerprint.json"
EMPTY_FILE = "empty.parquet"
STALE_AFTER_S = 3600.0
MAX_COMMIT_ATTEMPTS = 3


class RunStore:
    """Reads and writes the output folder of one run. Cheap to make; every process of a run has its own.

    ``run_id`` marks the staging files of one start of a run; the driver passes its own to its workers, with all that
    they need, as a ``ticket``. In mode overwrite everything that is read and written here is the new run's, which lies
    beside the old one until ``promote``.
    """

    def __init__(
        self,
        output_path: str,
        *,
        filesystem: fs.FileSystem | None = None,
        run_id: str | None = None,
        store: Store | None = None,
        mode: OutputMode = "resume",
        format: OutputFormat = "parquet",
        ticket: RunTicket | None = None,
    ) -> None:
        self.store = store if store is not None else Store(output_path, filesystem=filesystem)
        self.path = output_path
        self.mode = mode
        self.format = format
        self.lease: Lease | None = None
        self._is_open = ticket is not None
        meta = NEXT if mode == "overwrite" else META
        data = f"{NEXT}/files" if mode == "overwrite" and format == "parquet" else ""
        self.ticket = ticket or RunTicket(
            fingerprint="", run_id=run_id or uuid.uuid4().hex[:12], uid="", meta=meta, data=data
        )
        self._versions = versions()

    @property
    def run_id(self) -> str:
        return self.ticket.run_id

    def open(self, fields: Mapping[str, object], *, mode: OutputMode | None = None, anew: bool = False) -> None:
        """Take the folder for a run with these fingerprint fields.

        resume: go on with a run of the same fingerprint, or begin. error: begin; refuse a folder that holds a run.
        overwrite: begin a new run beside the one that is there, or go on with such a one of the same fingerprint,
        unless ``anew``.

        Raises:
            FingerprintMismatchError: the folder holds a run with another fingerprint; names the fields that differ.
            OutputError: mode is error and a run is there, or the folder holds Parquet files of something else.
        """
        assert mode in (None, self.mode), f"this store was made for mode {self.mode}"
        finish_swap(self.store)
        wanted = fingerprint(fields)
        text = self.read_meta(FINGERPRINT_FILE)
        known = None if text is None else json.loads(text)
        if known is not None and self.mode == "overwrite" and (anew or known.get("fingerprint") != wanted):
            self._clear()
            known = None
        if known is not None:
            self._compare(known, fields)
            self._take(wanted, uid=str(known.get("uid", "")))
            return
        self._refuse_foreign_files()
        uid = uuid.uuid4().hex[:8]
        values = {"fingerprint": wanted, "fields": dict(fields), "uid": uid}
        self.write_meta(FINGERPRINT_FILE, json.dumps(values, indent=1, sort_keys=True) + "\n")
        self._take(wanted, uid=uid)

    def compare(self, fields: Mapping[str, object]) -> None:
        """What ``open`` would refuse about the folder. Writes nothing."""
        if self.mode != "overwrite" or self.read_meta(FINGERPRINT_FILE) is None:
            self.compare_unfinished(fields)

    def compare_unfinished(self, fields: Mapping[str, object]) -> None:
        """As ``compare``; and raise FingerprintMismatchError for other fields of an overwrite that did not end too."""
        text = self.read_meta(FINGERPRINT_FILE)
        if text is None:
            self._refuse_foreign_files()
        else:
            self._compare(json.loads(text), fields)

    def join(self, fingerprint: str) -> RunStore:
        """For readers: look at a run of this fingerprint, if it is there. Gives the store itself."""
        text = self.read_meta(FINGERPRINT_FILE)
        self._take(fingerprint, uid="" if text is None else str(json.loads(text).get("uid", "")))
        return self

    def hold(self, lease: Lease) -> None:
        """Commit under a lease from now on: nothing is committed once another run has taken it over."""
        self.lease = lease
        self.ticket = replace(self.ticket, epoch=lease.epoch)

    def commit(self, result: ShardResult, *, replace: bool = False) -> ManifestEntry:
        """Write a finished shard and commit it; the entry that stands afterwards.

        When another attempt has committed the shard already, its rows stand and these are dropped, unless ``replace``
        (to try failed rows again). Two attempts at once end with one file and the entry of that file.

        Raises OutputError (TransientStorageError where another try may help) when the shard could not be saved, and
        LeaseLostError when another run has taken over.
        """
        assert self._is_open, "open or join the run first"
        if not replace and (standing := self.entry(result.key)) is not None:
            return standing
        data = parquet_bytes(result.table, keeps_types=self.format == "parquet")
        sha256 = hashlib.sha256(data).hexdigest()
        file = f"{result.key}.parquet" if self.format == "parquet" else f"{result.key}-{sha256[:8]}.parquet"
        for _ in range(MAX_COMMIT_ATTEMPTS):
            with self.store.lock(LOCK, shared=True):
                check_epoch(self.store, self.ticket.epoch)
                self._write(self.ticket.file_name(file), data)
                written = self.store.stat(self.ticket.file_name(file))
                entry = ManifestEntry(
                    shard=result.key,
                    fingerprint=self.ticket.fingerprint,
                    run_id=self.run_id,
                    file=file,
                    size_bytes=len(data),
                    sha256=sha256,
                    modified_s=None if written is None else written.modified_s,
                    epoch=self.ticket.epoch,
                    stats=result.stats,
                    retried=result.retried,
                    versions=self._versions,
                    finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                )
                check_epoch(self.store, self.ticket.epoch)
                self._write(self.ticket.entry_name(result.key), entry.to_json().encode())
            standing = self.entry(result.key)
            if standing is not None:
                return standing
        raise OutputError(
            f"shard {result.key}: {self.path}/{file} changed under this run {MAX_COMMIT_ATTEMPTS} times; "
            "make sure that no other run writes to this folder"
        )

    def entry(self, shard: str) -> ManifestEntry | None:
        """The shard's manifest entry if it is committed: of this run, with the file there and of the right content."""
        name = self.ticket.entry_name(shard)
        text = self.store.read(name)
        entry = None if text is None else self._parsed(text, source=name)
        if entry is None:
            return None
        found = self.store.stat(self.ticket.file_name(entry.file))
        return entry if self._stands(entry, found, verify_checksum=False) else None

    def committed(self, *, verify_checksums: bool = False) -> dict[str, ManifestEntry]:
        """Every committed shard. Entries whose file is missing or has another size or content are left out.

        A file with the size and modification time of its commit is taken as it is; one that was copied or touched is
        compared by checksum. ``verify_checksums=True`` reads and compares every file.
        """
        files = self.store.files(self.ticket.data)
        names = [name for name in sorted(self.store.files(self.ticket.manifest)) if name.endswith(".json")]
        found: dict[str, ManifestEntry] = {}
        for name, text in self.store.read_all(names).items():
            entry = self._parsed(text, source=name)
            if entry is None:
                continue
            file = files.get(self.ticket.file_name(entry.file))
            if self._stands(entry, file, verify_checksum=verify_checksums):
                found[entry.shard] = entry
        return found

    def discard(self, shards: Iterable[str]) -> None:
        """Take back the commits of shards, so that they are made again; their files stay until they are replaced."""
        for shard in shards:
            self.store.delete(self.ticket.entry_name(shard))

    def sweep(self, *, min_age_s: float = STALE_AFTER_S) -> list[str]:
        """Remove shard files without a manifest entry, and staging files, that are at least ``min_age_s`` old.

        Another attempt may be between its rename and its manifest entry, so young files stay; a rerun of their shard
        replaces them anyway. Files with names that no run writes are left alone, and so are all data files of table
        formats, which older versions of the table may name. Gives the names removed.
        """
        standing = {self.ticket.file_name(entry.file) for entry in self.committed().values()}
        shard_files = self.store.files(self.ticket.data) if self.format == "parquet" else {}
        candidates = [file for file in self.store.files(STAGING).values() if file.name.endswith(".tmp")]
        candidates += [
            file
            for file in shard_files.values()
            if SHARD_FILE.fullmatch(file.name.rpartition("/")[2]) and file.name not in standing
        ]
        now_s = time.time()
        stale = sorted(file.name for file in candidates if now_s - file.modified_s >= min_age_s)
        for name in stale:
            self.store.delete(name)
        return stale

    def withdraw_success(self) -> None:
        """The output is not complete any more. A run that overwrites leaves the mark of the old one until the swap."""
        if self.mode != "overwrite":
            self.store.delete(SUCCESS)

    def has_success(self) -> bool:
        return self.store.stat(SUCCESS) is not None

    def is_swapping(self) -> bool:
        """Whether an overwriting run was interrupted while it took the place of the old one."""
        return self.store.stat(SWAP) is not None

    def keep_columns(self, schema: pa.Schema) -> None:
        """Note the columns of an output that has no rows, for ``read_output``."""
        self._write(f"{self.ticket.meta}/{EMPTY_FILE}", parquet_bytes(schema.empty_table()))

    def finish(self) -> None:
        """Write ``_SUCCESS``: every shard of the plan is committed. See ``finish.finish_run`` for all of the end."""
        self._write(SUCCESS, b"")

    def read_meta(self, name: str) -> str | None:
        """A file of the run's state, or None."""
        data = self.store.read(f"{self.ticket.meta}/{name}")
        return None if data is None else data.decode()

    def write_meta(self, name: str, text: str) -> None:
        """Write a file of the run's state (``plan.json``, ``run.yaml``, ``metrics.jsonl``) as a whole."""
        self._write(f"{self.ticket.meta}/{name}", text.encode())

    def claim_meta(self, name: str, text: str) -> str:
        """Write a file of the run's state unless there is one; the text that stands, the same for all who claim it."""
        with self.store.lock(LOCK, shared=True):
            check_epoch(self.store, self.ticket.epoch)
            is_ours = self.store.create(
                f"{self.ticket.meta}/{name}", text.encode(), staging=f"{STAGING}/{name}.{uuid.uuid4().hex[:8]}.tmp"
            )
        if is_ours and not self.store.is_local:
            time.sleep(SETTLE_S)
        return self.read_meta(name) or text

    def after_swap(self) -> None:
        """The run is the output now: look where it lies from here on."""
        data = self.ticket.data if self.format != "parquet" else ""
        self.ticket = replace(self.ticket, meta=META, data=data)
        self.mode = "resume"

    def check_integrity(self) -> None:
        """Every manifest entry is committed, every shard file has one, and nothing is staged."""
        committed = self.committed(verify_checksums=True)
        entries = [name for name in self.store.files(self.ticket.manifest) if name.endswith(".json")]
        assert {self.ticket.entry_name(shard) for shard in committed} == set(entries)
        names = self.store.files(self.ticket.data)
        files = {name for name in names if SHARD_FILE.fullmatch(name.rpartition("/")[2])}
        standing = {self.ticket.file_name(entry.file) for entry in committed.values()}
        assert files == standing if self.format == "parquet" else files >= standing
        assert not self.store.files(STAGING)

    def _take(self, fingerprint: str, *, uid: str) -> None:
        data = self.ticket.data if self.format == "parquet" else f"data-{uid}"
        self.ticket = replace(self.ticket, fingerprint=fingerprint, uid=uid, data=data)
        self._is_open = True

    def _write(self, name: str, data: bytes) -> None:
        leaf = name.rpartition("/")[2]
        self.store.write(name, data, staging=f"{STAGING}/{leaf}.{self.run_id}.{uuid.uuid4().hex[:8]}.tmp")

    def _parsed(self, text: bytes, *, source: str) -> ManifestEntry | None:
        entry = ManifestEntry.from_json(text, source=f"{self.path}/{source}")
        return entry if self.ticket.fingerprint in ("", entry.fingerprint) else None

    def _stands(self, entry: ManifestEntry, file: StoredFile | None, *, verify_checksum: bool) -> bool:
        if file is None or file.size_bytes != entry.size_bytes:
            return False
        if file.modified_s == entry.modified_s and not verify_checksum:
            return True
        data = self.store.read(file.name)
        return data is not None and hashlib.sha256(data).hexdigest() == entry.sha256

    def _compare(self, known: Mapping[str, object], fields: Mapping[str, object]) -> None:
        if self.mode == "error":
            raise OutputError(f"{self.path} holds a run already; use output.mode=resume to go on with it, or overwrite")
        if known.get("fingerprint") == fingerprint(fields):
            return
        before = known.get("fields")
        lines = differences(before if isinstance(before, dict) else {}, fields)
        raise FingerprintMismatchError(
            f"{self.path} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\nchoose another output.path, restore these settings, or use output.mode=overwrite"
        )

    def _refuse_foreign_files(self) -> None:
        if self.format != "parquet" or self.store.read(f"{META}/{FINGERPRINT_FILE}") is not None:
            return
        foreign = sorted(name for name in self.store.files() if name.endswith(".parquet"))
        if foreign:
            raise OutputError(
                f"{self.path} holds {len(foreign)} Parquet files that no run wrote, such as {foreign[0]}; "
                "choose an empty output.path"
            )

    def _clear(self) -> None:
        """Remove a run that was to overwrite and will not: its entries before its files, its fingerprint last."""
        for name in sorted(self.store.files(self.ticket.manifest)):
            self.store.delete(name)
        last = f"{self.ticket.meta}/{FINGERPRINT_FILE}"
        for name in sorted(self.store.files(self.ticket.meta, recursive=True)):
            if name != last:
                self.store.delete(name)
        self.store.delete(last)


def parquet_bytes(table: pa.Table, *, keeps_types: bool = True) -> bytes:
    """The table as one Parquet file. The same table gives the same bytes.

    ``keeps_types``: write down the Arrow types too that Parquet has no name for; the files of tables do without.
    """
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, compression="zstd", store_schema=keeps_types)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"cannot write these columns as Parquet: {error}") from error
    return sink.getvalue().to_pybytes()


def read_output(path: str | Path, *, filesystem: fs.FileSystem | None = None) -> pa.Table:
    """All committed rows of a run of format parquet, in the order of its shards; the new run's once a swap has begun.

    A finished run over an input without rows gives its columns. Raises OutputError where nothing is committed.
    """
    run = RunStore(str(path), filesystem=filesystem)
    files = swapping_files(run.store)
    if files is None:
        files = [entry.file for _, entry in sorted(run.committed().items())]
    if not files and run.store.stat(f"{META}/{EMPTY_FILE}") is not None:
        files = [f"{META}/{EMPTY_FILE}"]
    if not files:
        raise OutputError(f"{path} holds no committed shard")
    tables = []
    for name, data in run.store.read_all(files).items():
        assert data is not None, f"{name} was there a moment ago"
        tables.append(pq.read_table(pa.BufferReader(data)))
    return pa.concat_tables(tables)
