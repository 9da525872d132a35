"""The saved state of training: weights, optimiser and place in the data, as one file that is whole or absent."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dspark_batch.errors import OutputError
from dspark_batch.provenance import atomic_write_bytes
from dspark_batch.training.packing import Place
from dspark_batch.training.student import Student

STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class Progress:
    """step: steps that are done. elapsed_s: time that they took, over all processes."""

    step: int = 0
    place: Place = field(default_factory=Place)
    elapsed_s: float = 0.0


def save_state(
    file: Path, student: Student, optimizer: torch.optim.Optimizer, progress: Progress, *, identity: str
) -> None:
    """Raises OSError. identity: of the settings and rows that decide the loss curve."""
    state = {
        "identity": identity,
        "step": progress.step,
        "place": asdict(progress.place),
        "elapsed_s": progress.elapsed_s,
        "parameters": {name: p.detach().cpu() for name, p in student.parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(file, buffer.getvalue())


def load_state(file: Path, student: Student, optimizer: torch.optim.Optimizer, *, identity: str) -> Progress:
    """Put a saved state into ``student`` and ``optimizer``; an empty Progress where there is none.

    Raises:
        OutputError: the file is damaged, or of a run with other settings or rows.
    """
    if not file.is_file():
        return Progress()
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if state["identity"] != identity:
            raise OutputError(
                f"{file} is the state of a training with other settings or rows; undo the change, or delete it to "
                "begin anew"
            )
        with torch.no_grad():
            for name, parameter in student.parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(int(state["step"]), Place(**state["place"]), float(state["elapsed_s"]))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError) as error:
        raise OutputError(f"{file} cannot be read as a training state: {error}; delete it to begin anew") from error
