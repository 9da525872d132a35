"""What the runner needs of a backend: shards in, manifest entries out, and a way to stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dspark_batch.batch.live import LiveCounts
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.shards import Shard

TICK_S = 0.2
"""Longest time that a backend keeps the runner waiting without handing over control."""


class Backend(Protocol):
    """Runs shards to their commit; table data never passes through it."""

    def run(self, shards: Sequence[Shard]) -> Iterator[ManifestEntry | None]:
        """The entry of every shard once it is committed, in any order; None whenever ``TICK_S`` passed without one.

        Ends when all shards are committed, or, after ``stop``, when those that were running are. Raises the
        DSparkBatchError that ended the run.
        """
        ...

    def live(self) -> LiveCounts:
        """What the engines of this backend have produced so far, committed or not."""
        ...

    def is_at_work(self) -> bool:
        """Whether a shard has begun, as far as is known here; models load before."""
        ...

    def warnings(self) -> Sequence[str]:
        """What these engines warned of so far, each text once, in order."""
        ...

    def stop(self) -> bool:
        """Begin no further shard. Those that run go on to their commit. False: none has begun, nothing is lost."""
        ...
