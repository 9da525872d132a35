"""The arg-max of a product, of which most is never made."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dspark_batch.models import huge_pages
from dspark_batch.models.kernels.packed import TILE_OUTPUTS, PackedLinear


class ProductArgmax:
    """The first largest output of a packed product, bit for bit that of the product itself.

    Weights and rows as small integers give bounds of every output at a fraction of the cost; only outputs whose upper
    bound reaches the best lower one are made. ``screens``: whether to do so, by default where it pays on this CPU and
    the product can be bounded: no bias, and weights of a length that float can multiply. It takes a byte a weight.
    """

    def __init__(self, product: PackedLinear, *, screens: bool = True) -> None:
        assert not product.gated, "a gated product has no arg-max"
        self._product = product
        self._screen = None
        if screens and product.bias is None and product.kernels.lib.ds_can_screen():
            screen = _Screen(product)
            self._screen = screen if screen.bounds_all else None

    @property
    def screens(self) -> bool:
        """Whether most outputs are never made."""
        return self._screen is not None

    def of_all_outputs(self) -> ProductArgmax:
        """The same without a screen."""
        return ProductArgmax(self._product, screens=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, in] -> (index [M] int64, largest [M]) of the float32 outputs; index -1 where one is NaN."""
        index = torch.empty(x.shape[0], dtype=torch.int64)
        best = torch.empty(x.shape[0], dtype=torch.float32)
        self._product.kernels.lib.ds_product_argmax(
            *self._product.arguments,
            None if self._screen is None else ctypes.byref(self._screen.native),
            x.data_ptr(),
            x.shape[0],
            index.data_ptr(),
            best.data_ptr(),
        )
        return index, best


_SHORTEST, _LONGEST = 1e-10, 1e10


class _NativeScreen(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed", "scale", "error", "norm"))


class _Screen:
    """Weights as int8, and by output: their scale, the length of what they leave out, and their own."""

    def __init__(self, product: PackedLinear) -> None:
        num_tiles = -(-product.out_features // TILE_OUTPUTS)
        self._packed = huge_pages.zeros(
            ((num_tiles + num_tiles % 2) * TILE_OUTPUTS * product.in_features,), dtype=torch.int8
        )
        self._by_output = torch.zeros(3, num_tiles * TILE_OUTPUTS)
        self.native = _NativeScreen(self._packed.data_ptr(), *(row.data_ptr() for row in self._by_output))
        product.kernels.lib.ds_screen(
            product.is_bf16,
            product.weight.data_ptr(),
            product.out_features,
            product.in_features,
            ctypes.byref(self.native),
        )

    @property
    def bounds_all(self) -> bool:
        """Whether float holds the bounds of all outputs, also of the shortest and the longest row that has integers."""
        norm = self._by_output[2]
        return bool(((norm == 0) | (norm >= _SHORTEST) & (norm <= _LONGEST)).all())
