"""The training loop: batches, steps, the loss curve, saved states. Killed and started again, it goes on as if nothing
had happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_batch.errors import EngineError
from dspark_batch.models.families import DecoderSpec
from dspark_batch.training.arithmetic import drafter_flops, head_flops, target_flops
from dspark_batch.training.config import OptimizeSection
from dspark_batch.training.curve import CURVE_FILE, CurveFile, CurvePoint
from dspark_batch.training.deadline import Deadline, TimeUpError
from dspark_batch.training.losses import LossWeights
from dspark_batch.training.optimizer import learning_rate, make_optimizer
from dspark_batch.training.packing import BlockOrder, PackedBlocks, pack
from dspark_batch.training.sequences import TokenRow
from dspark_batch.training.state import STATE_FILE, Progress, load_state, save_state
from dspark_batch.training.student import StepLoss, Student
from dspark_batch.training.teacher import TaughtRows, Teacher


@dataclass(slots=True)
class _Window:
    """Sums since the last point of the curve; device tensors are read only when the point is made."""

    losses: list[StepLoss] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    num_positions: int = 0
    flops: float = 0.0

    def point(self, *, step: int, rate: float, elapsed_s: float) -> CurvePoint:
        mean: dict[str, Any] = {
            name: torch.stack([getattr(loss, name).detach().float() for loss in self.losses]).mean(0).tolist()
            for name in ("total", "ce", "soft_ce", "distance", "confidence", "acceptance", "hits")
        }
        survival, length = 1.0, 1.0
        for hit in mean["hits"]:
            survival *= hit
            length += survival
        return CurvePoint(
            step=step,
            loss=mean["total"],
            ce=mean["ce"],
            soft_ce=mean["soft_ce"],
            distance=mean["distance"],
            confidence=mean["confidence"],
            acceptance=tuple(mean["acceptance"]),
            hits=tuple(mean["hits"]),
            estimated_length=length,
            learning_rate=rate,
            gradient_norm=float(torch.stack(self.norms).mean()),
            num_positions=self.num_positions,
            flops=self.flops,
            elapsed_s=elapsed_s,
        )


class Trainer:
    """Trains one student on token rows, in a folder that holds its state and its loss curve.

    taught: the same rows with what the target says. identity: of everything that decides the loss curve; a saved state
    of another identity is refused.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        rows: Sequence[TokenRow],
        taught: TaughtRows,
        config: OptimizeSection,
        *,
        folder: Path,
        identity: str,
    ) -> None:
        self.student, self._rows, self._config = student, rows, config
        self.folder, self._identity = folder, identity
        self._spec: DecoderSpec = teacher.spec
        self.taught = taught
        self._order = BlockOrder(rows, anchors_per_row=config.anchors_per_sequence, seed=config.seed)
        self._optimizer = make_optimizer(student.parameters, config)
        self._weights = LossWeights(
            ce=config.ce_weight,
            soft_ce=config.soft_ce_weight,
            distance=config.distance_weight,
            confidence=config.confidence_weight,
            decay_tokens=config.decay_tokens or float(student.config.block_size),
            reach=config.reach_weight,
        )
        self.progress = load_state(folder / STATE_FILE, student, self._optimizer, identity=identity)

    @property
    def is_finished(self) -> bool:
        return self.progress.step >= self._config.num_steps

    def run(self, *, deadline: Deadline | None = None, on_point: Callable[[CurvePoint], None] | None = None) -> None:
        """Train to the last step.

        Raises:
            TimeUpError: the deadline passed; the state is saved.
            EngineError: the loss is not finite.
            OSError: the state cannot be written.
        """
        curve = CurveFile(self.folder / CURVE_FILE, step=self.progress.step)
        window, start_s, before_s = _Window(), time.monotonic(), self.progress.elapsed_s
        while not self.is_finished:
            step, place = self.progress.step, self.progress.place
            num_slots = self._num_slots(step)
            num_blocks = self._config.anchors_per_step * self.student.config.block_size // num_slots
            pieces, place = self._order.take(place, num_blocks)
            self._step(step, pack(pieces, self._rows, num_slots=num_slots), window)
            step += 1
            if step % self._config.log_every and step != self._config.num_steps:
                self.progress = Progress(step, place, self.progress.elapsed_s)
                continue
            rate = learning_rate(step - 1, self._config)
            point = window.point(step=step, rate=rate, elapsed_s=before_s + time.monotonic() - start_s)
            self.progress = Progress(step, place, point.elapsed_s)
            _check_finite(point)
            curve.append(point)
            if on_point is not None:
                on_point(point)
            window = _Window()
            is_late = deadline is not None and deadline.has_passed
            if is_late or self.is_finished or step % self._config.save_every == 0:
                self._save()
            if is_late and not self.is_finished:
                raise TimeUpError

    def _num_slots(self, step: int) -> int:
        """Of the blocks of a step: all, or the first alone while that is cheaper to learn from."""
        is_single = step < self._config.single_slot_fraction * self._config.num_steps
        return 1 if is_single else self.student.config.block_size

    def _step(self, step: int, batch: PackedBlocks, window: _Window) -> None:
        taught = self.taught
        tokens, outputs = taught.num_computed_tokens, taught.num_computed_outputs
        loss = self.student.loss(batch, taught.get(batch.rows), weights=self._weights)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._config)
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.student.parameters.values())
        window.norms.append(torch.nn.utils.clip_grad_norm_(parameters, self._config.clip_norm).detach())
        self._optimizer.step()
        window.losses.append(replace(loss, total=loss.total.detach()))
        window.num_positions += batch.num_positions
        window.flops += self._flops(
            batch, num_tokens=taught.num_computed_tokens - tokens, num_outputs=taught.num_computed_outputs - outputs
        )

    def _flops(self, batch: PackedBlocks, *, num_tokens: int, num_outputs: int) -> float:
        config = self.student.config
        own = drafter_flops(
            config,
            num_slots=batch.is_real.size,
            slots_per_block=batch.is_real.shape[1],
            num_context_tokens=batch.num_context_tokens,
            num_attended=batch.num_attended,
        )
        num_positions = sum(len(positions) for positions in batch.positions)
        mean = num_tokens / max(1, len(set(batch.rows)))
        target = target_flops(self._spec, num_tokens=num_tokens, mean_tokens=mean, num_outputs=num_outputs)
        return own + target + head_flops(config, num_positions=num_positions)

    def _save(self) -> None:
        save_state(self.folder / STATE_FILE, self.student, self._optimizer, self.progress, identity=self._identity)


def _check_finite(point: CurvePoint) -> None:
    if not (abs(point.loss) < float("inf") and point.gradient_norm < float("inf")):
        raise EngineError(
            f"training diverged by step {point.step}: loss {point.loss}, gradient norm {point.gradient_norm}; lower "
            "optimize.learning_rate and delete the state to begin anew"
        )
