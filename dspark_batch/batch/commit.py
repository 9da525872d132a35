"""The output folder of a run. A shard is committed when its manifest entry stands; everything else is swept.

Layout: ``<shard>.parquet``, ``_SUCCESS``, and in ``_dspark/``: ``plan.json``, ``run.yaml``, ``fingerprint.json``,
``metrics.jsonl``, ``manifest/<shard>.json``, ``staging/<shard>.<run>.<attempt>.tmp``.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.store import Store
from dspark_batch.errors import FingerprintMismatchError, OutputError
from dspark_batch.job.config import OutputMode
from dspark_batch.provenance import fingerprint, versions

META = "_dspark"
FINGERPRINT = f"{META}/fingerprint.json"
MANIFEST = f"{META}/manifest"
STAGING = f"{META}/staging"
SUCCESS = "_SUCCESS"
SHARD_FILE = re.compile(r"part-\d{5,}-[0-9a-f]{8}\.parquet")
STALE_AFTER_S = 3600.0
MAX_COMMIT_ATTEMPTS = 3


class RunStore:
    """Reads and writes the output folder of one run. Cheap to make; every process of a run has its own.

    ``run_id`` marks the staging files of one start of a run; the driver passes its own to its workers.
    """

    def __init__(
        self,
        output_path: str,
        *,
        filesystem: fs.FileSystem | None = None,
        run_id: str | None = None,
        store: Store | None = None,
    ) -> None:
        self.store = store if store is not None else Store(output_path, filesystem=filesystem)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.path = output_path
        self._fingerprint: str | None = None
        self._versions = versions()

    def open(self, fields: Mapping[str, object], *, mode: OutputMode) -> None:
        """Take the folder for a run with these fingerprint fields.

        resume: go on with a run of the same fingerprint, or begin. error: begin; refuse a folder that holds a run.
        overwrite: remove the run that is there, whatever its fingerprint, and begin anew.

        Raises:
            FingerprintMismatchError: the folder holds a run with another fingerprint; names the fields that differ.
            OutputError: mode is error and a run is there, or the folder holds Parquet files of something else.
        """
        if mode == "overwrite":
            self._remove_run()
        known = self.store.read(FINGERPRINT)
        self._fingerprint = fingerprint(fields)
        if known is None:
            self._refuse_foreign_files()
            text = json.dumps({"fingerprint": self._fingerprint, "fields": dict(fields)}, indent=1, sort_keys=True)
            self.write_meta("fingerprint.json", text + "\n")
            return
        if mode == "error":
            raise OutputError(f"{self.path} holds a run already; use output.mode=resume to go on with it, or overwrite")
        self._compare(json.loads(known), fields)

    def join(self, fingerprint: str) -> RunStore:
        """For workers: write into a folder that the driver opened for this fingerprint. Gives the store itself."""
        self._fingerprint = fingerprint
        return self

    def commit(self, result: ShardResult, *, replace: bool = False) -> ManifestEntry:
        """Write a finished shard and commit it; the entry that stands afterwards.

        When another attempt has committed the shard already, its rows stand and these are dropped, unless ``replace``
        (to try failed rows again). Two attempts at once end with one file and the entry of that file.

        Raises OutputError (TransientStorageError where another try may help) when the shard could not be saved.
        """
        assert self._fingerprint is not None, "open or join the run first"
        if not replace and (standing := self.entry(result.key)) is not None:
            return standing
        name = f"{result.key}.parquet"
        data = parquet_bytes(result.table)
        entry = ManifestEntry(
            shard=result.key,
            fingerprint=self._fingerprint,
            run_id=self.run_id,
            file=name,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            stats=result.stats,
            versions=self._versions,
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        for _ in range(MAX_COMMIT_ATTEMPTS):
            self._write(name, data)
            self._write(_entry_name(result.key), entry.to_json().encode())
            standing = self.entry(result.key)
            if standing is not None:
                return standing
        raise OutputError(
            f"shard {result.key}: {self.path}/{name} changed under this run {MAX_COMMIT_ATTEMPTS} times; "
            "make sure that no other run writes to this folder"
        )

    def entry(self, shard: str) -> ManifestEntry | None:
        """The shard's manifest entry if it is committed: of this run, with the file there and of the right content."""
        text = self.store.read(_entry_name(shard))
        if text is None:
            return None
        entry = self._parsed(text, source=_entry_name(shard))
        if entry is None or not self._same_content(entry):
            return None
        return entry

    def committed(self, *, verify_checksums: bool = True) -> dict[str, ManifestEntry]:
        """Every committed shard. Entries whose file is missing or has another size or checksum are left out.

        ``verify_checksums=False`` compares sizes only, which reads one listing instead of every file.
        """
        files = self.store.files()
        found: dict[str, ManifestEntry] = {}
        for name in sorted(self.store.files(MANIFEST)):
            if not name.endswith(".json"):
                continue
            text = self.store.read(name)
            entry = None if text is None else self._parsed(text, source=name)
            if entry is None or entry.file not in files or files[entry.file].size_bytes != entry.size_bytes:
                continue
            if not verify_checksums or self._same_content(entry):
                found[entry.shard] = entry
        return found

    def sweep(self, *, min_age_s: float = STALE_AFTER_S) -> list[str]:
        """Remove shard files without a manifest entry, and staging files, that are at least ``min_age_s`` old.

        Another attempt may be between its rename and its manifest entry, so young files stay; a rerun of their shard
        replaces them anyway. Files with names that no run writes are left alone. Gives the names removed.
        """
        standing = {entry.file for entry in self.committed(verify_checksums=False).values()}
        candidates = [file for file in self.store.files(STAGING).values() if file.name.endswith(".tmp")]
        candidates += [
            file
            for file in self.store.files().values()
            if SHARD_FILE.fullmatch(file.name) and file.name not in standing
        ]
        now_s = time.time()
        stale = sorted(file.name for file in candidates if now_s - file.modified_s >= min_age_s)
        for name in stale:
            self.store.delete(name)
        return stale

    def finish(self) -> None:
        """Write ``_SUCCESS``: every shard of the plan is committed."""
        self._write(SUCCESS, b"")

    def read_meta(self, name: str) -> str | None:
        """A file of ``_dspark``, or None."""
        data = self.store.read(f"{META}/{name}")
        return None if data is None else data.decode()

    def write_meta(self, name: str, text: str) -> None:
        """Write a file of ``_dspark`` (``plan.json``, ``run.yaml``, ``metrics.jsonl``) as a whole."""
        self._write(f"{META}/{name}", text.encode())

    def check_integrity(self) -> None:
        """Every manifest entry is committed, every shard file has one, and nothing is staged."""
        committed = self.committed()
        entries = [name for name in self.store.files(MANIFEST) if name.endswith(".json")]
        assert {_entry_name(shard) for shard in committed} == set(entries)
        files = {name for name in self.store.files() if SHARD_FILE.fullmatch(name)}
        assert files == {entry.file for entry in committed.values()}
        assert not self.store.files(STAGING)

    def _write(self, name: str, data: bytes) -> None:
        leaf = name.rpartition("/")[2]
        self.store.write(name, data, staging=f"{STAGING}/{leaf}.{self.run_id}.{uuid.uuid4().hex[:8]}.tmp")

    def _parsed(self, text: bytes, *, source: str) -> ManifestEntry | None:
        entry = ManifestEntry.from_json(text, source=f"{self.path}/{source}")
        return entry if self._fingerprint in (None, entry.fingerprint) else None

    def _same_content(self, entry: ManifestEntry) -> bool:
        data = self.store.read(entry.file)
        return data is not None and len(data) == entry.size_bytes and hashlib.sha256(data).hexdigest() == entry.sha256

    def _compare(self, known: Mapping[str, object], fields: Mapping[str, object]) -> None:
        if known.get("fingerprint") == self._fingerprint:
            return
        before = known.get("fields")
        old = before if isinstance(before, dict) else {}
        differing = sorted(name for name in {*old, *fields} if old.get(name) != fields.get(name))
        lines = [f"  {name}: {old.get(name)!r} there, {fields.get(name)!r} here" for name in differing]
        raise FingerprintMismatchError(
            f"{self.path} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\nchoose another output.path, restore these settings, or use output.mode=overwrite"
        )

    def _refuse_foreign_files(self) -> None:
        foreign = sorted(name for name in self.store.files() if name.endswith(".parquet"))
        if foreign:
            raise OutputError(
                f"{self.path} holds {len(foreign)} Parquet files that no run wrote, such as {foreign[0]}; "
                "choose an empty output.path"
            )

    def _remove_run(self) -> None:
        """Manifest entries go before the files they name, and the fingerprint last, so that a crash loses no track."""
        self.store.delete(SUCCESS)
        for name in sorted(self.store.files(MANIFEST)):
            self.store.delete(name)
        for name in sorted(self.store.files()):
            if SHARD_FILE.fullmatch(name):
                self.store.delete(name)
        for name in sorted(self.store.files(META, recursive=True)):
            if name != FINGERPRINT:
                self.store.delete(name)
        self.store.delete(FINGERPRINT)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file. The same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, compression="zstd")
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"cannot write these columns as Parquet: {error}") from error
    return sink.getvalue().to_pybytes()


def read_output(path: str, *, filesystem: fs.FileSystem | None = None) -> pa.Table:
    """All committed rows of a run, in the order of its shards. Raises OutputError where nothing is committed."""
    run = RunStore(path, filesystem=filesystem)
    entries = run.committed(verify_checksums=False)
    if not entries:
        raise OutputError(f"{path} holds no committed shard")
    tables = []
    for shard in sorted(entries):
        data = run.store.read(entries[shard].file)
        assert data is not None, f"{entries[shard].file} was there a moment ago"
        tables.append(pq.read_table(pa.BufferReader(data)))
    return pa.concat_tables(tables)


def _entry_name(shard: str) -> str:
    return f"{MANIFEST}/{shard}.json"
