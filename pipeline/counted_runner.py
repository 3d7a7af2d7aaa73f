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

import targets
from pipeline import compiler, cycle_model, executable, kernel, toolchain, workspace
from targets import Target, cores

HERTZ = 1e9
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


def build(given: tuple[str, tvm.IRModule, Any]) -> str:
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
