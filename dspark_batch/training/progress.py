"""What a training run says while it works."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from dspark_batch.training.curve import CurvePoint


@dataclass(slots=True)
class Progress:
    """Writes lines to a stream, those of the loss curve at most every ``every_s`` seconds."""

    num_steps: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every_s: float = 5.0
    _shown_s: float = 0.0
    _before: CurvePoint | None = None

    def say(self, text: str) -> None:
        self.stream.write(f"dspark-batch train: {text}\n")
        self.stream.flush()

    def point(self, point: CurvePoint) -> None:
        now = time.monotonic()
        before, self._before = self._before, point
        if now - self._shown_s < self.every_s and point.step < self.num_steps:
            return
        self._shown_s = now
        speed = ""
        if before is not None and point.elapsed_s > before.elapsed_s:
            seconds = point.elapsed_s - before.elapsed_s
            speed = f", {point.num_positions / seconds:,.0f} positions/s ({point.flops / seconds / 1e9:,.0f} GFLOP/s)"
        self.say(
            f"step {point.step}/{self.num_steps}, loss {point.loss:.4f}, estimated accepted length "
            f"{point.estimated_length:.2f}{speed}"
        )
