"""Scheduled TIR functions as CUDA C++: kernels, and how the host starts them.

TVM's passes run up to where host and GPU part. What is left of a function on the host is a straight line of launches
with sizes that are known; from them a TVM library's packed functions are made here, and a C library's driver in
`cuda_library`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from pipeline.kernel import Temporary, sequence

_AXES = [f"{index}.{axis}" for index in ("blockIdx", "threadIdx") for axis in "xyz"]
_COMPILE = "tvm_callback_cuda_compile"
STATIC_SHARED_BYTES = 48 << 10  # what a kernel may have without asking


@dataclass(frozen=True)
class Launch:
    """One start of a kernel.

    Attributes:
        kernel: its symbol.
        pointers: for each of its parameters, which of the function's tensors it is.
        grid, block: how many blocks, and threads in each.
        shared_bytes: shared memory that the kernel is given when it starts.
    """

    kernel: str
    pointers: tuple[int, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int

    def line(self, tensors: list[str]) -> str:
        """The call of `LAUNCH`, on the C expressions of the function's tensors."""
        grid, block = (f"dim3({', '.join(map(str, extents))})" for extents in (self.grid, self.block))
        given = ", ".join(tensors[i] for i in self.pointers)
        return f"launch({self.kernel}, {grid}, {block}, {self.shared_bytes}, stream, {given})"


@dataclass(frozen=True)
class Kernel:
    """What one scheduled function became: launches in this order. No schedule keeps a tensor between two of them, so
    there are no temporaries."""

    launches: tuple[Launch, ...]
    tensors: int
    temporaries: tuple[Temporary, ...] = ()


# C++: starts a kernel on a stream.
LAUNCH = f"""\
template <typename... Parameters, typename... Arguments>
static cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments... arguments) {{
  if (shared_bytes > {STATIC_SHARED_BYTES}) {{
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (status != cudaSuccess) return status;
  }}
  cudaLaunchConfig_t config = {{}};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...);
}}
"""

_HEAD = """
#include <cuda_runtime.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

static const DLTensor *tensor(const TVMFFIAny *any) {
  return any->type_index == kTVMFFIDLTensorPtr ? (const DLTensor *)any->v_ptr : TVMFFITensorGetDLTensorPtr(any->v_obj);
}
"""

_FUNCTION = """
extern "C" __attribute__((visibility("default"))) int32_t __tvm_ffi_{name}(void *, const TVMFFIAny *arguments, int32_t,
                                                                           TVMFFIAny *) {{
  void *t[{count}];
  for (int i = 0; i < {count}; i++) t[i] = tensor(arguments + i)->data;
  const DLDevice device = tensor(arguments)->device;
  const cudaStream_t stream = (cudaStream_t)TVMFFIEnvGetStream(device.device_type, device.device_id);
  cudaError_t status = cudaSetDevice(device.device_id);
{launches}
  if (status == cudaSuccess) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", cudaGetErrorString(status));
  return -1;
}}
"""


def make(functions: dict[str, tirx.PrimFunc], target: Any) -> tuple[str, dict[str, Kernel]]:
    """CUDA C++ of the kernels of scheduled functions, and how each function starts its own.

    Args:
        functions: by the names that their kernels' symbols begin with.
        target: TVM's.
    """
    mod = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    host = tvm.target.Target("llvm")
    with target:
        mod = _PASSES(tirx.transform.BindTarget(target.with_host(host))(mod))
        device = {g: f for g, f in mod.functions_items() if g.name_hint not in functions}
        with _only_source():
            made = tvm.get_global_func("target.build.cuda")(_DEVICE_PASSES(tvm.IRModule(device)), target)
    # All arrays of this kind in a file are one to nvcc, so they must have one type.
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"extern __shared__ __align__(128) unsigned char shared_memory[];\n  \1 *\2 = (\1 *)shared_memory;",
        made.inspect_source("cuda"),
    )
    return source, {name: _kernel(mod[name]) for name in functions}


def packed(kernels: dict[str, Kernel]) -> str:
    """CUDA C++ of functions that TVM's virtual machine calls with the tensors of each kernel."""
    functions = []
    for name, kernel in kernels.items():
        names = [f"t[{i}]" for i in range(kernel.tensors)]
        lines = [f"  if (status == cudaSuccess) status = {each.line(names)};" for each in kernel.launches]
        functions.append(_FUNCTION.format(name=name, count=kernel.tensors, launches="\n".join(lines)))
    return _HEAD + LAUNCH + "".join(functions)


def shared_bytes(kernels: Iterable[Kernel]) -> int:
    """The most shared memory that a block of any kernel is given when it starts."""
    return max((launch.shared_bytes for kernel in kernels for launch in kernel.launches), default=0)


# `tvm.s_tir.pipeline.default_s_tir_pipeline` up to where it makes packed functions, and its passes for a GPU.
_PASSES = tvm.transform.Sequential(
    [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.ManifestSharedMemoryLocalStage(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerAutoCopy(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.InjectPermutedLayout(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.InjectSoftwarePipeline(),
        s_tir.transform.TransformMmaBufferLayout(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        s_tir.transform.InjectVirtualThread(),
        s_tir.transform.InjectDoubleBuffer(),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("shared.dyn"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.InferFragment(),
        s_tir.transform.LowerThreadAllreduce(),
        s_tir.transform.MergeSharedMemoryAllocations(),
        tirx.transform.SplitHostDevice(),
    ]
)
_DEVICE_PASSES = tvm.transform.Sequential(
    [tirx.transform.LowerWarpMemory(), tirx.transform.StmtSimplify(), tirx.transform.LowerIntrin()]
)


@contextmanager
def _only_source() -> Iterator[None]:
    """Keep TVM from compiling what it prints: it does so, for the GPU of this machine, where it finds a driver."""
    known = tvm.get_global_func(_COMPILE)
    tvm_ffi.register_global_func(_COMPILE, lambda _: b"", override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_COMPILE, known, override=True)


def _kernel(function: tirx.PrimFunc) -> Kernel:
    """The launches of what is left of a function on the host."""
    places = [(parameter, i) for i, parameter in enumerate(function.params)]
    launches: list[Launch] = []

    def place(data: Any) -> int:
        return next(i for buffer, i in places if buffer.same_as(data.args[0]))

    for statement in sequence(function.body):
        if isinstance(statement, tirx.DeclBuffer):
            places.append((statement.buffer, place(statement.data)))
        else:
            call = getattr(statement, "value", None)
            is_launch = isinstance(call, tvm.ir.Call) and call.op.name == "tirx.call_ffi_kernel"
            assert is_launch, f"the host does more for a function than start kernels: {statement}"
            launches.append(_launch(call, place))
    return Kernel(tuple(launches), len(function.params))


def _launch(call: Any, place: Callable[[Any], int]) -> Launch:
    axes = [str(axis) for axis in call.attrs.launch_params]
    symbol, *pointers = call.args[: len(call.args) - len(axes)]
    sizes = {axis: int(size) for axis, size in zip(axes, call.args[len(call.args) - len(axes) :], strict=True)}
    shared = sizes.pop("tirx.use_dyn_shared_memory", 0)
    assert sizes.keys() <= set(_AXES), f"unknown launch parameters: {axes}"
    extents = [sizes.get(axis, 1) for axis in _AXES]
    grid, block = (extents[0], extents[1], extents[2]), (extents[3], extents[4], extents[5])
    return Launch(str(symbol.value), tuple(map(place, pointers)), grid, block, shared)
