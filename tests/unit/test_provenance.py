from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_batch import provenance
from dspark_batch.provenance import (
    atomic_write_bytes,
    atomic_write_text,
    device_facts,
    differences,
    fingerprint,
    versions,
)


def test_fingerprint_ignores_key_order_and_sees_every_value() -> None:
    assert fingerprint({"a": 1, "b": [1, None]}) == fingerprint({"b": [1, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": "1"}) != fingerprint({"a": 1})


def test_differences_name_every_field_that_is_not_the_same() -> None:
    lines = ["  a: 1 there, 2 here", "  c: None there, 'x' here"]
    assert differences({"a": 1, "b": [1]}, {"a": 2, "b": [1], "c": "x"}) == lines


def test_fingerprint_refuses_values_that_are_not_json() -> None:
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"a": object()})


def test_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.json"
    atomic_write_text(target, "first")
    atomic_write_bytes(target, b"second")
    assert target.read_bytes() == b"second"
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


def test_a_failing_atomic_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    atomic_write_text(target, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_versions_and_device_facts_load_no_framework() -> None:
    code = (
        "import sys; from dspark_batch.provenance import *; v = versions(); device_facts();"
        "assert 'python' in v and 'pyarrow' in v, v;"
        "assert not {'torch', 'ray', 'pyspark', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert versions()["python"].count(".") == 2
    assert device_facts().num_cpus >= 1
