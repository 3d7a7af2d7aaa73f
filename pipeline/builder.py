"""MetaSchedule's builder of candidates, in processes that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

from targets import Target, cores

_USES = 200  # of a process that builds, before another takes its place: TVM's grow


@derived_object
class Builder(ms.builder.PyBuilder):
    """Makes a file of each candidate, in processes that a candidate which crashes the compiler ends.

    MetaSchedule's own builder starts its processes for every 16 candidates, which takes longer than to build those.

    Args:
        build: a module's function: of a target's name, a TIR module and TVM's target, a file in a folder of its own.
        seconds: that a candidate may take.
    """

    def __init__(self, build: Callable[[tuple[str, tvm.IRModule, Any]], str], target: Target, seconds: float) -> None:
        super().__init__()
        self.make, self.target, self.seconds = build, target, seconds
        self.pool = PopenPoolExecutor(cores(), timeout=seconds, maximum_process_uses=_USES)

    def build(self, build_inputs: list[Any]) -> list[Any]:
        given = [(self.target.name, one.mod, one.target) for one in build_inputs]
        made = self.pool.map_with_error_catching(self.make, given)
        slow = f"it took more than {self.seconds:g} s to build"  # the error of a process that was stopped is empty
        return [
            ms.builder.BuilderResult(one.value, None)
            if one.status == StatusKind.COMPLETE
            else ms.builder.BuilderResult(None, slow if one.status == StatusKind.TIMEOUT else str(one.value))
            for one in made
        ]

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown()
