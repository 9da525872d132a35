"""Cost tables on disk: one JSON file for each device, model, dtype, drafter, number of threads and set of versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_batch.provenance import atomic_write_bytes, fingerprint
from dspark_batch.scheduling.cost_table import CostTable

logger = logging.getLogger(__name__)

FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKey:
    """What a table is valid for. target, drafter: fingerprint of the weights, name and settings of the drafter.
    versions: of torch, of this package and of its kernels."""

    device: str
    threads: int
    target: str
    dtype: str
    drafter: str
    versions: tuple[str, ...]

    def file_in(self, folder: Path) -> Path:
        return folder / f"{fingerprint(self.as_dict())[:32]}.json"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "versions": list(self.versions)}


def load_table(folder: Path, key: CostKey, *, most_rows: int) -> CostTable | None:
    """The table of ``key``, if there is one that covers ``most_rows`` rows. A file that is damaged, or says that it is
    another's, is refused with a warning; it is as good as absent, and the next :func:`save_table` replaces it."""
    file = key.file_in(folder)
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _refuse(file, f"it cannot be read: {error}")
        return None
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        _refuse(file, f"it is not a cost table of format {FORMAT}")
        return None
    if found.get("key") != key.as_dict():
        _refuse(file, f"it was measured for {found.get('key')}, not for {key.as_dict()}")
        return None
    try:
        table = CostTable.from_dict(found["table"])
    except (KeyError, TypeError, ValueError) as error:
        _refuse(file, f"its figures are damaged: {error}")
        return None
    if found.get("checksum") != _checksum(table):
        _refuse(file, "its checksum is wrong")
        return None
    if table.most_rows < most_rows and not found.get("is_all_that_fits"):
        return None
    return table


def save_table(folder: Path, key: CostKey, table: CostTable, *, is_all_that_fits: bool = False) -> Path | None:
    """Write whole or not at all; None where the folder cannot be written, which must not stop a run."""
    file = key.file_in(folder)
    content = {
        "format": FORMAT,
        "key": key.as_dict(),
        "table": table.as_dict(),
        "is_all_that_fits": is_all_that_fits,
        "checksum": _checksum(table),
    }
    try:
        atomic_write_bytes(file, json.dumps(content).encode())
    except OSError as error:
        logger.info("the cost table is not kept: %s", error)
        return None
    return file


def _refuse(file: Path, reason: str) -> None:
    logger.warning("the cost table %s is refused and measured anew: %s", file, reason)


def _checksum(table: CostTable) -> str:
    return fingerprint(table.as_dict())
