"""Relax -> machine code: lower, fuse, apply tuning records, schedule what has none, build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax import dpl
from tvm.relax.transform import PatternCheckContext
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

import pipeline.llvm  # noqa: F401 (TVM finds its function by name)
from pipeline import cuda_kernel, in_place, program, work
from targets import Target
from tvm_ops import adder_network, byte_products, byte_sums, schedule_cpu, schedule_cuda
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.ops import bitpack


def check_threads(target: Target, threads: int) -> None:
    """Refuse threads that would have nothing to do.

    Raises:
        ValueError: several, for a GPU.
    """
    if target.gpu is not None and threads > 1:
        raise ValueError(f"target {target.name} is a GPU, which has no use for {threads} threads: leave --threads out")


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """Operators to TIR functions, element-wise ones fused into what produces them, and packings too. Reshapes are none:
    once they are scheduled, TVM takes them for work."""
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            fuse_packings,
            relax.transform.RewriteDataflowReshape(),
            relax.transform.DeadCodeElimination(),
        ]
    )(mod)


@tvm.transform.module_pass(opt_level=0)
def fuse_packings(mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Functions that give floats and the words of their signs, of a packing that ``joins`` and what makes its floats.

    Only sums to whole words of channels take one in: their schedule packs a tile while it is in registers. FuseOps
    would not: it fuses what has one reader, and these floats have others.
    """

    def joins(context: PatternCheckContext) -> bool:
        packing, floats = (mod[context.annotated_expr[name]] for name in ("packing", "floats"))
        channels = int(packing.params[0].ty.shape[-1])
        asks = packing.attrs is not None and "joins" in packing.attrs
        return asks and channels % WORD_BITS == 0 and schedule_cpu.has_reduction(tvm.IRModule({"main": floats}))

    patterns = []
    for bounds in (1, 2):  # a packing has a lower one, and an upper one if channels descend
        packing, floats = dpl.GlobalVarPattern(), dpl.GlobalVarPattern()
        made = dpl.is_op("relax.call_tir")(floats, dpl.wildcard())
        arguments = dpl.TuplePattern([made, *(dpl.wildcard() for _ in range(bounds))])
        both = dpl.is_op("relax.call_tir")(packing, arguments)
        patterns.append(("packed", both, {"packing": packing, "floats": floats}, joins))
    fused = relax.transform.FuseTIR()(relax.transform.FuseOpsByPattern(patterns, bind_constants=False)(mod))
    for name in program.functions(fused).keys() - program.functions(mod).keys():
        _, macs = work.products(fused[name])
        fused[name] = fused[name].with_attr("estimated_flops", 2 * macs)  # MetaSchedule cannot count in a packing
    return fused


def default_schedule(mod: tvm.IRModule, target: Target, threads: int) -> Any:
    """An ``s_tir.Schedule`` of the function ``main`` of ``mod``, by the rule of `schedule_cpu` or `schedule_cuda`."""
    sch = Schedule(mod)  # of the module as it is: a schedule of ``func.with_attr(..)`` changes ``func`` too
    if target.gpu is None:
        schedule_cpu.schedule(sch, target, threads)
    else:
        schedule_cuda.schedule(sch, target)
    return sch


def open_records(folder: Path, target: Target) -> Any:
    """MetaSchedule's database of a records folder, made if there is none."""
    file = folder / "database_tuning_record.json"
    text = file.read_text() if file.is_file() else ""
    if target.byte_counter is not None:
        adder_network.register_those_in(text, target.byte_counter)
    if target.byte_popcount is not None:
        byte_sums.register_those_in(text, target.byte_popcount)
    if target.byte_product is not None:
        byte_products.register_those_in(text, target.byte_product)
    return ms.database.JSONDatabase(work_dir=str(folder))


def finish(function: Any, target: Target) -> Any:
    """A scheduled function as it is built: what no schedule can say is done here."""
    if target.gpu is not None:
        return schedule_cuda.written(function, target)
    if target.sign_bits:
        return bitpack.with_masks(function, target.sign_bits)
    return bitpack.with_shifts(function, target.shift_insert) if target.shift_insert else function


def scheduled(
    mod: tvm.IRModule, target: Target, threads: int, records: Path | None = None
) -> tuple[tvm.IRModule, int, int]:
    """A lowered module with every kernel scheduled, how many kernels it has, and how many a tuning record made.

    Args:
        threads: cores to share work between.
        records: a MetaSchedule work folder; kernels without a record get the default schedule.
    """
    if records is not None:
        with target.tvm_target(threads), open_records(records, target):
            mod = relax.transform.MetaScheduleApplyDatabase()(mod)
    mod = mod.clone()
    kernels = program.functions(mod)
    for name, func in kernels.items():
        if not _is_tuned(func):
            mod[name] = default_schedule(tvm.IRModule({"main": func}), target, threads).mod["main"]
        mod[name] = finish(mod[name], target)
    if target.gpu is None:
        mod = in_place.reuse(mod)
    left = program.functions(mod).values()
    return mod, len(left), sum(map(_is_tuned, left))


def _is_tuned(function: Any) -> bool:
    return bool(function.attrs and function.attrs.get("tirx.is_scheduled", False))


def build(mod: tvm.IRModule, target: Target, threads: int, records: Path | None = None) -> tuple[Any, int, int]:
    """An executable of TVM's virtual machine; otherwise as `scheduled`."""
    mod, kernels, tuned = scheduled(mod, target, threads, records)
    return relax.build(mod, target.tvm_target(threads), relax_pipeline="default"), kernels, tuned


# TVM's `default_build_pipeline`, less what makes kernels of operators: its own pipeline for GPUs schedules them anew.
_TO_MACHINE = tvm.transform.Sequential(
    [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)


@dataclass(frozen=True)
class CudaBuild:
    """A network for a GPU: two halves of a library.

    Attributes:
        executable: of TVM's virtual machine. It calls its kernels by name and has none.
        source: of those kernels, CUDA C++; an object of it is to be linked with the executable.
        shared_bytes: the most shared memory that a block is given when a kernel starts.
        kernels, tuned: as `scheduled` counts them.
    """

    executable: Any
    source: str
    shared_bytes: int
    kernels: int
    tuned: int


def build_cuda(mod: tvm.IRModule, target: Target, records: Path | None = None) -> CudaBuild:
    """As `build`, for a GPU: TVM alone would need a driver here, or leave its source to be compiled at every start."""
    mod, count, tuned = scheduled(mod, target, 1, records)
    source, kernels = cuda_kernel.make(program.functions(mod), target.tvm_target(1))
    executable = relax.build(_calls_by_name(mod), target.tvm_target(1), relax_pipeline=_TO_MACHINE)
    text = source + cuda_kernel.packed(kernels)
    return CudaBuild(executable, text, cuda_kernel.shared_bytes(kernels.values()), count, tuned)


def _calls_by_name(mod: tvm.IRModule) -> tvm.IRModule:
    """``main`` alone, with a call of a library's function for each of a TIR function's."""

    @relax.expr_functor.mutator
    class Caller(relax.PyExprMutator):
        def visit_call_(self, call: Any) -> Any:
            call = super().visit_call_(call)
            if not program.calls_kernel(call):
                return call
            return relax.call_dps_packed(call.args[0].name_hint, call.args[1], call.ty_args[0])

    return tvm.IRModule({"main": Caller(mod).visit_expr(mod["main"])})
