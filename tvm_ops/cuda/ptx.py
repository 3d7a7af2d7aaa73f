"""The instructions that CUDA C++ has no name for, as functions that kernels call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LANES = 32
"""Threads of a warp."""


def _call(name: str, source: str, *args: Any) -> None:
    from tvm.script.ir_builder import tirx as T

    T.evaluate(T.cuda.func_call(name, *args, source_code=source))


def mma(shape: str, operation: str, d: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> None:
    """d += popc(a op b) over a fragment."""
    name = f"mma_{shape}_{operation}"
    counts = len(d), len(a), len(b), len(d)
    places, operands = [], 0
    for count in counts:
        places.append("{" + ", ".join(f"%{operands + i}" for i in range(count)) + "}")
        operands += count
    outputs = ", ".join(f'"=r"(d{i})' for i in range(len(d)))
    inputs = ", ".join(f'"r"({v}{i})' for v, count in zip("abd", counts[1:], strict=True) for i in range(count))
    parameters = [f"int& d{i}" for i in range(len(d))]
    parameters += [f"unsigned {v}{i}" for v, count in (("a", len(a)), ("b", len(b))) for i in range(count)]
    instruction = f"mma.sync.aligned.{shape}.row.col.s32.b1.b1.s32.{operation}.popc"
    source = f"""__device__ __forceinline__ void {name}({", ".join(parameters)}) {{
  asm volatile("{instruction} {", ".join(places)};" : {outputs} : {inputs});
}}
"""
    _call(name, source, *d, *a, *b)


_LDMATRIX = """__device__ __forceinline__ void ldmatrix_x4(
    unsigned& d0, unsigned& d1, unsigned& d2, unsigned& d3, const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : "r"(address));
}
"""
_COMMIT = """__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
"""


def ldmatrix(registers: Sequence[Any], row: Any) -> None:
    """Four matrices of 8 rows x 16 bytes; lane 8 m + r brings the address of row r of matrix m."""
    _call("ldmatrix_x4", _LDMATRIX, *registers, row)


def copy_async(to: Any, source: Any, size: int, valid: Any) -> None:
    """Start copying ``size`` bytes to shared memory; zeros where not ``valid``."""
    name = f"cp_async_{size}"
    cache = "cg" if size == 16 else "ca"  # past the first cache, which only whole vectors can
    text = f"""__device__ __forceinline__ void {name}(void* to, const void* from, int valid) {{
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.{cache}.shared.global [%0], [%1], {size}, %2;"
               : : "r"(address), "l"(from), "r"(valid ? {size}u : 0u) : "memory");
}}
"""
    _call(name, text, to, source, valid)


def commit_async() -> None:
    """End a group of copies."""
    _call("cp_async_commit", _COMMIT)


def wait_async(groups: int) -> None:
    """Wait until at most so many of this thread's committed copies are under way."""
    name = f"cp_async_wait_{groups}"
    text = f"""__device__ __forceinline__ void {name}() {{
  asm volatile("cp.async.wait_group {groups};" : : : "memory");
}}
"""
    _call(name, text)
