"""Where the files of a run lie in its output folder, and what a worker needs to write there."""

from __future__ import annotations

import re
from dataclasses import dataclass

META = "_dspark"
NEXT = f"{META}/next"
"""State of a run that overwrites another, until the swap."""
SUCCESS = "_SUCCESS"
SWAP = f"{META}/swap.json"
STAGING = f"{META}/staging"
LOCK = f"{META}/lock"
SHARD_FILE = re.compile(r"part-\d{5,}-[0-9a-f]{8}(-[0-9a-f]{8})?\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTicket:
    """What lets a worker commit to a run that the driver opened. Plain values that travel to any machine.

    ``meta`` is the folder of the run's state and ``data`` the folder of its shard files, both relative to the output
    folder. ``epoch`` is the driver's lease; None where the run has none.
    """

    fingerprint: str
    run_id: str
    uid: str
    meta: str = META
    data: str = ""
    epoch: int | None = None

    @property
    def manifest(self) -> str:
        return f"{self.meta}/manifest"

    def entry_name(self, shard: str) -> str:
        return f"{self.manifest}/{shard}.json"

    def file_name(self, file: str) -> str:
        """The path of a shard file below the output folder."""
        return f"{self.data}/{file}" if self.data else file
