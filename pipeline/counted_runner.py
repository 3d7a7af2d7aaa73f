"""MetaSchedule without a board: candidates run once under QEMU, and the model gives the cycles of what was counted.

Emulated time would rank candidates wrongly, so none is taken (`pipeline/cycle_model.py`). Records hold seconds, as
MetaSchedule's must: those of a core of `HERTZ`, which is no core's clock but makes a nanosecond a cycle.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

import targets
from pipeline import compiler, cycle_model, executable, kernel, toolchain, workspace
from targets import Target, cores

HERTZ = 1e9
_USES = 200  # of a process that builds, before another takes its place: TVM's grow
_SYMBOL = "k_k0_main"  # what `kernel.make` makes of the function main with the prefix k


def check(target: Target, threads: int) -> None:
    """Refuse what cannot be counted.

    Raises:
        ValueError: a tool is missing, LLVM has no model of the target, or several threads would share the work.
    """
    cycle_model.tools(target)
    toolchain.find(target)
    if threads > 1:
        raise ValueError(
            f"target {target.name} is not this machine's, and counted cycles say nothing about {threads} threads: "
            "give --threads 1, or a board with --rpc"
        )


@derived_object
class Builder(ms.builder.PyBuilder):
    """Makes an executable of each candidate, in processes that a candidate which crashes the compiler ends.

    MetaSchedule's own builder starts its processes for every 16 candidates, which takes longer than to build those.

    Args:
        seconds: that a candidate may take.
    """

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__()
        self.target, self.seconds = target, seconds
        self.pool = PopenPoolExecutor(cores(), timeout=seconds, maximum_process_uses=_USES)

    def build(self, build_inputs: list[Any]) -> list[Any]:
        given = [(self.target.name, one.mod, one.target) for one in build_inputs]
        made = self.pool.map_with_error_catching(_build, given)
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


def _build(given: tuple[str, tvm.IRModule, Any]) -> str:
    """The executable of a candidate, of a target's name, a module, and TVM's target."""
    name, mod, llvm = given
    target = targets.load(name)
    function = compiler.finish(mod["main"], target)
    made = kernel.make({"main": function}, "k", llvm, target.registers * target.vector_bits // 8)["main"]
    sizes = [int(np.prod([int(n) for n in p.ty.shape])) * np.dtype(str(p.ty.dtype)).itemsize for p in function.params]
    places, size = workspace.in_turn([*sizes, *(temporary.size for temporary in made.temporaries)])
    return str(executable.link(made.parts, [(_SYMBOL, places)], size, target, Path(tempfile.mkdtemp())))


@derived_object
class CountedRunner(ms.runner.PyRunner):
    """Counts the cycles of executables, of identical ones once.

    Args:
        seconds: that a candidate may run under QEMU.
    """

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__()
        self.target, self.seconds = target, seconds
        self.known: dict[str, Any] = {}

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        programs = [Path(given.artifact_path) for given in runner_inputs]
        digests = [hashlib.sha256(program.read_bytes()).hexdigest() for program in programs]
        new = {digest: p for digest, p in zip(digests, programs, strict=True) if digest not in self.known}
        with ThreadPoolExecutor(cores()) as pool:  # what takes the time are other processes
            self.known.update(zip(new, pool.map(self._count, new.values()), strict=True))
        return [ms.runner.RunnerFuture(lambda: True, functools.partial(self.known.get, digest)) for digest in digests]

    def _count(self, program: Path) -> Any:
        try:
            counted = cycle_model.count(self.target, program, ["/dev/zero"], [_SYMBOL], self.seconds)
        except subprocess.TimeoutExpired:
            return ms.runner.RunnerResult(None, f"it ran more than {self.seconds} s under QEMU")
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "it says nothing").strip().splitlines()[-1]
            return ms.runner.RunnerResult(None, f"{error.cmd[0]} ended with {error.returncode}: {said}")
        return ms.runner.RunnerResult([counted[_SYMBOL].cycles / HERTZ], None)
