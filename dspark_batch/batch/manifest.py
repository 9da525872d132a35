"""The record that commits a shard. Files without one do not count."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from dspark_batch.batch.results import ShardStats
from dspark_batch.errors import OutputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One committed shard: its file with size and SHA-256, its totals, and where it came from."""

    shard: str
    fingerprint: str
    run_id: str
    file: str
    size_bytes: int
    sha256: str
    modified_s: float | None = None
    """Modification time of the file, as its store gives it; a file that still has it need not be read again."""
    epoch: int | None = None
    """Lease of the run that committed; None for a run without one."""
    stats: ShardStats
    versions: dict[str, str]
    finished_at: str
    """UTC, ISO 8601."""
    retried: ShardStats | None = None
    """Totals of those rows alone that ``--retry-failed`` generated again; None where all rows are of one attempt."""

    @property
    def work(self) -> ShardStats:
        """Totals of the rows that were generated for this commit."""
        return self.retried or self.stats

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str, *, source: str) -> ManifestEntry:
        """Raises OutputError where the text is not a manifest entry of this version."""
        try:
            values: dict[str, Any] = json.loads(text)
            stats = ShardStats(**values.pop("stats"))
            again = values.pop("retried", None)
            return cls(stats=stats, retried=None if again is None else ShardStats(**again), **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(f"{source} is not a manifest entry of this version: {error}; delete it") from error
