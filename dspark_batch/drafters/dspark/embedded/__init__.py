"""Drafters that ship with the package, one folder each (``config.json``, ``model.safetensors`` and its card)."""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).parent


def embedded_drafter(target_fingerprint: str, *, folder: Path = _FOLDER) -> Path | None:
    """The folder of the shipped drafter that was trained for the target of this fingerprint; None without one."""
    for file in sorted(folder.glob("*/config.json")):
        if json.loads(file.read_text(encoding="utf-8")).get("target_fingerprint") == target_fingerprint:
            return file.parent
    return None
