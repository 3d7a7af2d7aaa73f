"""The CUDA kernel of a packing: a lane makes a bit, and a warp's vote is a word."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.cuda.ptx import LANES
from tvm_ops.ops import bitpack
from tvm_ops.tir import blocks, if_, unravel, with_body

_WARPS = 4
_WORDS = 8
"""What a warp makes, so that its reads are under way together: 32 bytes, the least that memory writes at once."""


def write(func: Any) -> Any:
    """The function ``func``, whose maps are inlined, as a kernel."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    found = blocks(func)
    flags, words = found[bitpack.FLAGS], found[bitpack.BLOCK]
    extents = words.extents[:-1]
    total = math.prod(extents)
    with IRBuilder() as builder, T.prim_func(), ExitStack() as threads:
        launch = [("blockIdx.x", -(-total // (_WARPS * _WORDS))), ("threadIdx.y", _WARPS), ("threadIdx.x", LANES)]
        block, warp, lane = (threads.enter_context(T.launch_thread(*axis)) for axis in launch)
        first = (block * _WARPS + warp) * _WORDS
        mine = T.alloc_buffer((1,), "uint32", scope="local")
        for i in range(_WORDS):
            *outer, word = unravel(first + i, extents)
            bit = flags.value(*outer, word * WORD_BITS + lane)
            if total % (_WARPS * _WORDS):
                bit = tirx.if_then_else(first + i < total, bit, tirx.const(0, "uint32"))
            every = tirx.const(0xFFFFFFFF, "uint32")
            vote = T.bind(T.cuda.ballot_sync(every, tirx.Cast("int32", bit)))
            T.buffer_store(mine, vote if i == 0 else tirx.Select(lane == i, vote, mine[0]), [0])
        with if_(tirx.all(lane < _WORDS, first + lane < total)):
            T.buffer_store(words.buffer, mine[0], words.indices(*unravel(first + lane, extents), 0))
    return with_body(func, builder.get().body)
