"""A program as a C library for a GPU: kernels as machine code, constants, and a driver that only starts kernels.

<name>.h, lib<name>.so, lib<name>.a     the CUDA runtime is in the .so; no TVM
<name>.py                               the library from Python, with NumPy alone
<name>-config.cmake                     find_package(<name>): the target <name>::<name>
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm

import targets
from pipeline import c_library, compiler, cuda_kernel, cuda_toolchain, program, toolchain, workspace
from pipeline.artifact import CLibrary, Manifest
from pipeline.c_library import Argument
from pipeline.cuda_toolchain import Nvcc
from pipeline.program import Program, Tensor
from pipeline.toolchain import Toolchain
from targets import Target


def write(
    lowered: tvm.IRModule, manifest: Manifest, name: str, folder: Path, target: Target, records: Path | None
) -> dict[str, Any]:
    """Write the library of a lowered module to ``folder``; returns the fields of its manifest that it decides.

    Raises:
        ValueError: there is no compiler for the target, or something is left in the graph that no kernel computes.
    """
    nvcc, tools = cuda_toolchain.find(target), toolchain.find(target)
    scheduled, count, tuned = compiler.scheduled(lowered, target, 1, records)
    mod = program.straight(scheduled, target.tvm_target(1))
    functions = program.functions(mod)
    symbols = {function: f"{name}_k{i}_{function[:40]}" for i, function in enumerate(sorted(functions))}
    source, kernels = cuda_kernel.make({symbols[f]: functions[f] for f in functions}, target.tvm_target(1))
    outputs = tuple(spec.name for spec in manifest.outputs)
    made = program.line_up(mod, outputs, {f: kernels[symbols[f]] for f in functions}, 1)
    record = CLibrary(
        name=name,
        workspace_bytes=max(made.workspace_bytes, workspace.ALIGNMENT),
        workspace_bound=made.workspace_bound,
        constant_bytes=max(workspace.in_turn(constant.bytes for constant in made.constants)[1], workspace.ALIGNMENT),
        toolchain=nvcc.name,
    )
    gpus = targets.architectures(target, cuda_kernel.shared_bytes(made.kernels))
    _link(made, manifest.model_copy(update={"gpus": gpus}), record, source, folder, nvcc, tools)
    return {"kernels": count, "tuned_kernels": tuned, "c_library": record, "gpus": gpus}


def _link(
    made: Program, manifest: Manifest, record: CLibrary, source: str, folder: Path, nvcc: Nvcc, tools: Toolchain
) -> None:
    """Header, wrappers, lib<name>.so and lib<name>.a."""
    name = record.name
    values = c_library.interface(made, manifest, record, "library.cu.h")
    launches = [launch for kernel in made.kernels for launch in kernel.launches]
    values |= {
        "kernels": source,
        "launch": cuda_kernel.LAUNCH,
        "symbols": list(dict.fromkeys(launch.kernel for launch in launches)),
        "calls": _calls(made, {argument.tensor: argument.id for argument in values["tensors"]}),
        "block": _block(values["tensors"], record),
    }
    text = c_library.write_around("library.cu", values, folder)
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        c_library.make_constants(made, name, at, tools)
        nvcc.compile(text, at / "driver.o", manifest.gpus, f"-I{folder}")
        objects = [f"{at}/driver.o", f"{at}/constants.o"]
        versions = c_library.exports(("run_with", "run_once_with", "load_with", "strerror", "model"), name, at)
        nvcc.link_shared(str(folder / f"lib{name}.so"), objects, "-Xlinker", f"-s,-z,defs,{versions}")
        tools.run(*tools.cc, "-nostdlib", "-r", "-o", f"{at}/{name}.o", *objects)
        tools.run(*tools.ar, "rcs", str(folder / f"lib{name}.a"), f"{at}/{name}.o")


def _calls(made: Program, ids: dict[Tensor, str]) -> list[str]:
    """C++ that starts the kernels; each is a cudaError_t."""
    places, _ = workspace.in_turn(constant.bytes for constant in made.constants)
    constants = dict(zip(made.constants, places, strict=True))

    def place(tensor: Tensor) -> str:
        if tensor.kind == "scratch":
            return f"memory + {tensor.offset}"
        return f"weights + {constants[tensor]}" if tensor.kind == "constant" else ids[tensor]

    lines = [launch.line(list(map(place, call.tensors))) for call in made.calls for launch in call.kernel.launches]
    copy = "cudaMemcpyAsync({}, {}, {}, cudaMemcpyDeviceToDevice, stream)"
    return lines + [copy.format(ids[output], place(source), output.bytes) for output, source in made.copies]


def _block(tensors: Sequence[Argument], record: CLibrary) -> dict[str, int]:
    """Where everything lies in one piece of memory on the device, and its size."""
    sizes = {t.id: t.tensor.bytes for t in tensors}
    sizes |= {" constants": record.constant_bytes, " workspace": record.workspace_bytes}
    places, end = workspace.in_turn(sizes.values())
    return {**dict(zip(sizes, places, strict=True)), " size": end}
