"""Relax -> machine code: lower, fuse, apply tuning records, schedule what has none, build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import Schedule

from targets import Target
from tvm_ops.schedule_cpu import schedule


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


def default_schedule(func: tvm.tirx.PrimFunc, target: Target, threads: int) -> Any:
    """An ``s_tir.Schedule`` of ``func``, as ``main``, by the rule of `tvm_ops.schedule_cpu`."""
    sch = Schedule(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}))
    schedule(sch, target, threads)
    return sch


def build(mod: tvm.IRModule, target: Target, threads: int, records: Path | None = None) -> Any:
    """The executable of a lowered module.

    Args:
        threads: cores to share work between.
        records: a MetaSchedule work folder; functions without a record get the default schedule.
    """
    tvm_target = target.tvm_target(threads)
    if records is not None:
        with tvm_target:
            mod = relax.transform.MetaScheduleApplyDatabase(str(records))(mod)
    mod = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc) and not is_tuned(func):
            mod[name] = default_schedule(func, target, threads).mod["main"].without_attr("global_symbol")
    return relax.build(mod, tvm_target, relax_pipeline="default")


def is_tuned(func: tvm.tirx.PrimFunc) -> bool:
    """Whether a tuning record made this function."""
    return bool(func.attrs and func.attrs.get("tirx.is_scheduled", False))
