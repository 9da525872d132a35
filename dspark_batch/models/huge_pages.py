"""Large tensors in host memory, on huge pages where the system has them.

A decoding step reads all weights and all live keys and values once, long after the step before: with pages of 4 KiB the
processor has to look up an address every 64 cache lines.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LEAST_BYTES = 4 << 20


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As ``torch.zeros``. Memory of the host is taken from the system when it is first written to."""
    device = torch.device(device)
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
