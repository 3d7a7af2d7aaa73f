"""Relax -> machine code: lower, fuse, apply tuning records, schedule what has none, build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

import pipeline.llvm  # noqa: F401 (TVM finds its function by name)
from targets import Target
from tvm_ops import adder_network, byte_sums, schedule_cpu, schedule_cuda
from tvm_ops.ops import bitpack


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """Operators to TIR functions, element-wise ones fused into what produces them."""
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )(mod)


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
    return ms.database.JSONDatabase(work_dir=str(folder))


def finish(function: Any, target: Target) -> Any:
    """A scheduled function as it is built: what no schedule can say is done here."""
    if target.gpu is not None:
        return schedule_cuda.written(function, target)
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
    kernels = {name: f for name, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    untuned = {name: f for name, f in kernels.items() if not (f.attrs and f.attrs.get("tirx.is_scheduled", False))}
    for name, func in untuned.items():
        mod[name] = default_schedule(tvm.IRModule({"main": func}), target, threads).mod["main"]
    for name in kernels:
        mod[name] = finish(mod[name], target)
    return mod, len(kernels), len(kernels) - len(untuned)


def build(mod: tvm.IRModule, target: Target, threads: int, records: Path | None = None) -> tuple[Any, int, int]:
    """An executable of TVM's virtual machine; otherwise as `scheduled`."""
    mod, kernels, tuned = scheduled(mod, target, threads, records)
    return relax.build(mod, target.tvm_target(threads), relax_pipeline="default"), kernels, tuned
