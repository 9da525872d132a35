from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dspark_batch.models import locks, sources
from dspark_batch.models.kernels import build as building
from dspark_batch.models.kernels.library import Kernels, load_kernels


def write(_compiler: str, _flags: Sequence[str], target: Path) -> None:
    """In place of a compile."""
    target.write_bytes(b"library")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(building.SWITCH_VARIABLE, "off")
    assert load_kernels() is None


def test_without_a_compiler_there_are_no_kernels_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(building.SWITCH_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
        assert load_kernels() is None
    assert [record.message.count("no C++ compiler") for record in caplog.records] == [1]


def test_without_a_compiler_the_library_of_another_machine_of_the_kind_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(building, "_compile", write)
    library = building.build(directory=tmp_path)
    older = library.with_stem(library.stem.split("-")[0] + "-older")
    older.write_bytes(b"of another compiler")
    os.utime(older, (0, 0))
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    assert building.build(directory=tmp_path) == library
    with pytest.raises(building.BuildError, match="no C\\+\\+ compiler"):
        building.build(directory=tmp_path, extra_flags=["-DOTHER"])
    monkeypatch.setattr(building, "_cpu_flags", lambda: b"flags of another CPU")
    with pytest.raises(building.BuildError, match="no C\\+\\+ compiler"):
        building.build(directory=tmp_path)


def test_each_openmp_runtime_and_each_compiler_has_a_library_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(building, "_compile", write)
    found = {building.build(directory=tmp_path)}
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho another")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found.add(building.build(directory=tmp_path))
    monkeypatch.setattr(building, "loaded_openmp", lambda: Path("/elsewhere/libgomp-1234abcd.so.1"))
    found.add(building.build(directory=tmp_path))
    assert len(found) == 3


def test_a_failed_compile_is_a_build_error_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(building.BuildError, match="no-such-flag"):
        building.build(extra_flags=("-fno-such-flag-as-this", "--no-such-flag"), directory=tmp_path)
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_an_unwritable_cache_names_the_variable_to_set(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    with pytest.raises(building.BuildError, match=sources.CACHE_VARIABLE):
        building.build(directory=tmp_path)


def test_a_file_system_without_locks_takes_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(building, "_compile", write)
    assert building.build(directory=tmp_path).read_bytes() == b"library"


def test_the_library_lies_in_the_cache_folder_of_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(sources.CACHE_VARIABLE, "~/kept")
    monkeypatch.setattr(building, "_compile", write)
    assert building.build().parent == tmp_path / "kept" / "kernels"


def test_a_damaged_library_is_a_build_error(tmp_path: Path) -> None:
    file = tmp_path / "kernels.so"
    file.write_bytes(b"not a library")
    with pytest.raises(building.BuildError, match="delete it"):
        Kernels(file)


def test_the_library_uses_the_openmp_runtime_that_torch_loaded(kernels: Kernels) -> None:
    """torch.set_num_threads reaches the kernels only through a common runtime."""
    import torch

    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert kernels.num_threads == count
    torch.set_num_threads(before)
    assert building.loaded_openmp().name.startswith(("libgomp", "libiomp5", "libomp"))


def test_a_second_build_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    library = building.build()
    assert library.exists()
    monkeypatch.setattr(building, "_compile", refuse)
    assert building.build() == library
