"""A matrix product of `tvm_ops.ops.implicit_gemm`, read from its TIR function."""

from __future__ import annotations

from typing import Any

import tvm_ffi

from tvm_ops.ops import bitpack, implicit_gemm
from tvm_ops.tir import Block, blocks, loads, unravel


class Problem:
    """What a function multiplies, and what it makes of the sums."""

    def __init__(self, func: Any) -> None:
        self.blocks = blocks(func)
        self.products = self.blocks[implicit_gemm.BLOCK]
        self.patches = self.blocks[implicit_gemm.PATCHES]
        self.filters = self.blocks.get(implicit_gemm.FILTERS)
        self.flags = self.blocks.get(bitpack.FLAGS)
        self.last = next(b for b in self.blocks.values() if b.buffer.same_as(func.params[-1]))
        annotations = self.products.annotations
        self.operation = str(annotations["operation"])
        self.x, self.w, self.counts = ([int(v) for v in annotations[key]] for key in ("x", "w", "counts"))
        self.vector = int(annotations["vector"])
        self.rows, self.columns, *_ = self.products.extents
        self.depth = self.patches.extents[-1]
        weight = self.filters.buffer if self.filters else _operand(self.products, self.patches.buffer)
        self.weight = weight
        self.element = str(self.patches.buffer.dtype)

    @property
    def pairs(self) -> int:
        """Pairs of planes."""
        return len(self.x) * len(self.w)

    def patch(self, m: Any, plane: Any, k: Any) -> Any:
        return self.patches.value(m, plane, k)

    def filter(self, o: Any, plane: Any, k: Any) -> Any:
        if self.filters:
            return self.filters.value(o, plane, k)
        return self.weight[o, plane, k] if len(self.weight.shape) == 3 else self.weight[o, k]

    def finished(self, m: Any, o: Any, total: Any) -> Any:
        """What is stored for a sum, or its bit."""
        block = self.flags or self.last
        *pixel, _ = block.extents
        return loads(block.value(*unravel(m, pixel), o), self.products.buffer, total)


def _operand(products: Block, patches: Any) -> Any:
    from tvm.ir import TensorLoad

    found: list[Any] = []
    tvm_ffi.structural_walk(products.stored, (TensorLoad, lambda load: found.append(load.source)))
    return next(b for b in found if not b.same_as(patches) and not b.same_as(products.buffer))
