"""The loss curve: one JSON line per few steps, and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.provenance import atomic_write_text

CURVE_FILE = "curve.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Means over the steps since the point before. soft_ce: the cross-entropy with the target's distribution.
    acceptance: per slot, 1 - ½ Σ|p_d - p_t|; hits: per slot, share
    whose best token is the target's. estimated_length: 1 + Σ of the running products of hits, what greedy decoding
    would accept if slots were independent. num_positions: slots trained on; flops: what they needed, the target's
    passes included."""

    step: int
    loss: float
    ce: float
    soft_ce: float
    distance: float
    confidence: float
    acceptance: tuple[float, ...]
    hits: tuple[float, ...]
    estimated_length: float
    learning_rate: float
    gradient_norm: float
    num_positions: int
    flops: float
    elapsed_s: float


class CurveFile:
    """Appends points. Points past ``step``, of a process that was killed before it saved, are dropped at the start."""

    def __init__(self, file: Path, *, step: int) -> None:
        self._file = file
        kept = [point for point in read_curve(file) if point.step <= step]
        if file.is_file():
            atomic_write_text(file, "".join(_line(point) for point in kept))
        file.parent.mkdir(parents=True, exist_ok=True)

    def append(self, point: CurvePoint) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(_line(point))


def read_curve(file: Path) -> list[CurvePoint]:
    """The points of a curve file; an unfinished last line is left out."""
    points = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            fields: dict[str, Any] = json.loads(line)
        except ValueError:
            break
        lists: dict[str, Any] = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        points.append(CurvePoint(**{**fields, **lists}))
    return points


def draw_curve(points: Sequence[CurvePoint], file: Path) -> None:
    """Loss and estimated accepted length over the steps, as a PNG.

    Raises:
        ConfigError: matplotlib (extra ``report``) is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            [Problem("matplotlib", "is not installed; run: pip install 'dspark-batch[report]'")]
        ) from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [point.step for point in points]
    for name in ("loss", "distance", "confidence"):
        left.plot(steps, [getattr(point, name) for point in points], label=name)
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.plot(steps, [point.estimated_length for point in points], label="estimated accepted length")
    for slot in range(len(points[0].hits) if points else 0):
        right.plot(steps, [point.hits[slot] for point in points], label=f"hits of slot {slot + 1}", linewidth=0.8)
    right.set(xlabel="step", ylim=(0, None))
    right.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _line(point: CurvePoint) -> str:
    return json.dumps(asdict(point)) + "\n"
