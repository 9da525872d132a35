"""Random numbers of the rejection modes: one independent stream per use, keyed by (row, round, slot).

Block verification conditions its outcome on draws at slots past the accepted ones. A key made of the absolute position
would meet those draws again in the next round and bias the output; the round counter in the key prevents it.
Coupled verification does not use these streams: its noise is keyed by the position (``sampling.noise``).
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from dspark_batch.sampling.noise import uniform


class Stream(Enum):
    """What a random number decides. The values are arbitrary 63-bit constants, part of a run's reproducibility."""

    DRAFT = 0x2545F4914F6CDD1D
    ACCEPT = 0x5851F42D4C957F2D
    RESIDUAL = 0x14057B7EF767814F


def stream_keys(stream: Stream, keys: Tensor) -> Tensor:
    """The rows' noise keys, [R] int64, turned into those of one stream."""
    return keys ^ stream.value


def stream_uniforms(stream: Stream, *, keys: Tensor, rounds: Tensor, num_slots: int) -> Tensor:
    """[R, num_slots] float64, strictly between 0 and 1.

    keys: [R] int64 noise keys of the rows. rounds: [R] int64, a counter that no two rounds of a row share.
    """
    slots = torch.arange(num_slots, device=keys.device)
    return uniform(stream_keys(stream, keys), rounds, slots)


def rejection_uniforms(keys: Tensor, rounds: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """What a rejection rule consumes in one round: acceptance numbers [R, num_slots] and residual numbers [R]."""
    accept = stream_uniforms(Stream.ACCEPT, keys=keys, rounds=rounds, num_slots=num_slots)
    residual = stream_uniforms(Stream.RESIDUAL, keys=keys, rounds=rounds, num_slots=1)
    return accept, residual.squeeze(1)
