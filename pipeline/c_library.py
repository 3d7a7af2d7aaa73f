"""A program as a C library without a runtime: header, driver, and kernels as LLVM's objects or as C99.

<name>.h, lib<name>.so, lib<name>.a     c-lib: kernels by LLVM, for one CPU
<name>.h, <name>.c                      c-source: C99, for any compiler
<name>.py                               the library from Python, with NumPy alone
<name>-config.cmake                     find_package(<name>): the target <name>::<name>
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import jinja2
import tvm

from pipeline import c_names, c_source, compiler, kernel, llvm, program, toolchain, workspace
from pipeline.artifact import CLibrary, Manifest
from pipeline.artifact import Tensor as Spec
from pipeline.kernel import Part
from pipeline.program import Program, Tensor
from targets import Target

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("pipeline"),
    variable_start_string="[[",  # C is full of braces
    variable_end_string="]]",
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters["quoted"] = c_names.quoted
_TEMPLATES.filters["python"] = lambda text: json.dumps(text, ensure_ascii=False)
_INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_SCALARS = [(dtype, c_source.type_name(dtype)) for dtype in (*_INTEGERS, "float32", "float64")]
# Bits of AT_HWCAP, then of AT_HWCAP2. Linux, arch/{arm64,arm}/include/uapi/asm/hwcap.h
_HWCAPS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "aarch64": (
        {"fp": 0, "asimd": 1, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimdrdm": 12, "jscvt": 13, "fcma": 14}
        | {"lrcpc": 15, "asimddp": 20, "asimdfhm": 23, "uscat": 25, "ilrcpc": 26, "flagm": 27},
        {"flagm2": 7, "frint": 8, "i8mm": 13, "bf16": 14},
    ),
    "armv7l": ({"neon": 12, "vfpv4": 16, "idiva": 17, "idivt": 18}, {}),
}


@dataclass(frozen=True)
class Argument:
    """A tensor of the run function. id: its name in C."""

    role: Literal["input", "output"]
    id: str
    spec: Spec
    tensor: Tensor

    @property
    def declaration(self) -> str:
        return f"{'const ' if self.role == 'input' else ''}{c_source.type_name(self.spec.dtype)} *{self.id}"


def write(
    lowered: tvm.IRModule, manifest: Manifest, name: str, folder: Path, target: Target, records: Path | None
) -> dict[str, Any]:
    """Write the library of a lowered module to ``folder``; returns the fields of its manifest that it decides.

    Raises:
        ValueError: C has no words for a kernel, or there is no compiler for the target.
    """
    source = manifest.emit == "c-source"
    scheduled, kernels, tuned = compiler.scheduled(lowered, target, manifest.threads, records)
    cpu = target.tvm_target(manifest.threads)
    compiles_for = tvm.target.Target({"kind": "c"}) if source else cpu
    registers = target.registers * target.vector_bits // 8
    outputs = tuple(spec.name for spec in manifest.outputs)
    made = program.make(scheduled, outputs, name, compiles_for, manifest.threads, registers)
    tools = None if source else toolchain.find(target)
    record = CLibrary(
        name=name,
        workspace_bytes=max(made.workspace_bytes, workspace.ALIGNMENT),
        workspace_bound=made.workspace_bound,
        constant_bytes=sum(constant.bytes for constant in made.constants),
        toolchain=tools.name if tools else "",
    )
    parts, module = made.parts, kernel.module(made.parts)
    if source:
        text = "\n\n".join(c_source.define(module[part.symbol]) for part in parts)
        constants = "\n\n".join(_array(tensor) for tensor in made.constants)
    else:
        text, constants = "", _references(made, name)
    values = interface(made, manifest, record, "library.h") | _values(made, manifest, record, target, parts, text)
    driver = write_around("library.c", values | {"constants": constants}, folder)
    if tools is None:
        (folder / f"{name}.c").write_text(driver)
    else:
        _link(made, name, folder, driver, llvm.build(module, cpu), tools)
    return {"kernels": kernels, "tuned_kernels": tuned, "c_library": record}


def write_around(driver: str, values: dict[str, Any], folder: Path) -> str:
    """Write header, CMake config and Python wrapper of a library; returns its driver."""
    name = values["name"]
    (folder / f"{name}.h").write_text(_render(values["header"], values))
    (folder / f"{name}-config.cmake").write_text(_render("config.cmake", values))
    (folder / f"{name}.py").write_text(_render("network.py", values), encoding="utf-8")
    return _render(driver, values)


def _render(template: str, values: dict[str, Any]) -> str:
    return _TEMPLATES.get_template(f"{template}.jinja").render(values).rstrip() + "\n"


def interface(made: Program, manifest: Manifest, record: CLibrary, header: str) -> dict[str, Any]:
    """What the templates name of a library's interface, and a number that changes with its header."""
    arguments = _arguments(made, manifest, record.name)
    memories: list[tuple[str, str]] = [(a.role, f"{a.id}, sizeof *{a.id} * {a.tensor.elements}") for a in arguments]
    memories.append(("workspace", f"memory, {record.name.upper()}_WORKSPACE_BYTES"))
    values = {
        "header": header,
        "name": record.name,
        "NAME": record.name.upper(),
        "version": version("crossbit"),
        "manifest": manifest,
        "record": record,
        "alignment": workspace.ALIGNMENT,
        "tensors": arguments,
        "declarations": ", ".join(argument.declaration for argument in arguments),
        "arguments": ", ".join(argument.id for argument in arguments),
        "pairs": [(a, b) for (role, a), (other, b) in combinations(memories, 2) if {role, other} != {"input"}],
        "interface": 0,
    }
    values["interface"] = int(hashlib.sha256(_render(header, values).encode()).hexdigest()[:8], 16)
    return values


def _values(
    made: Program, manifest: Manifest, record: CLibrary, target: Target, parts: Sequence[Part], kernels: str
) -> dict[str, Any]:
    """What the driver's template names besides."""
    ids = {argument.tensor: argument.id for argument in _arguments(made, manifest, record.name)}
    cpu, features = ("", "") if kernels else _features(target)
    signatures = {part.symbol: c_source.parameters(part.function) for part in parts}
    return {
        "scalar_types": _SCALARS,
        "kernels": kernels,
        "cpu": cpu,
        "features": features,
        "signatures": signatures,
        "parallel": {part.symbol: _fields(signatures[part.symbol]) for part in parts if part.extent is not None},
        "calls": _calls(made, ids, signatures),
    }


def _fields(signature: list[str]) -> list[str]:
    """The members of a struct of a kernel's pointers."""
    return [re.sub(r"restrict \w+$", f"p{i}", text) for i, text in enumerate(signature[:-3])]


def _arguments(made: Program, manifest: Manifest, library: str) -> list[Argument]:
    names = iter(c_names.parameters([spec.name for spec in (*manifest.inputs, *manifest.outputs)], library))
    return [
        Argument(role, next(names), spec, tensor)  # type: ignore[arg-type]
        for role, specs, tensors in (
            ("input", manifest.inputs, made.inputs),
            ("output", manifest.outputs, made.outputs),
        )
        for spec, tensor in zip(specs, tensors, strict=True)
    ]


def _features(target: Target) -> tuple[str, Any]:
    """How a library asks for the CPU's features, and which."""
    if target.machine == "x86_64":  # GCC writes names without the kernel's underscores
        return "builtin", sorted(feature.replace("_", "") for feature in target.features)
    words = _HWCAPS[target.machine]
    unknown = sorted(target.features.difference(*words))
    if unknown:
        raise ValueError(f"target {target.name}: there is no HWCAP bit for {', '.join(unknown)}: add it to {__name__}")
    masks = [sum(1 << bits[feature] for feature in target.features & bits.keys()) for bits in words]
    return "hwcap", [
        (name, f"0x{mask:x}ul") for name, mask in zip(("AT_HWCAP", "AT_HWCAP2"), masks, strict=True) if mask
    ]


def _calls(made: Program, ids: dict[Tensor, str], signatures: dict[str, list[str]]) -> list[str]:
    """The lines that run the kernels."""

    def place(tensor: Tensor, parameter: str) -> str:
        if tensor.kind == "scratch":
            return f"({parameter.split('restrict')[0].strip()})(memory + {tensor.offset})"
        return tensor.name if tensor.kind == "constant" else ids[tensor]

    lines = []
    for call in made.calls:
        for part in call.kernel.parts:
            given = ", ".join(place(t, p) for t, p in zip(call.tensors, signatures[part.symbol], strict=False))
            if part.extent is None:
                lines.append(f"{part.symbol}({given});")
            else:
                lines.append(f"{{ struct {part.symbol}_arguments a = {{{given}}};")
                lines.append(f"  share(pool, {part.symbol}_range, &a, {part.extent}); }}")
    lines += [f"memcpy({ids[t]}, {place(source, 'const void *restrict')}, {t.bytes});" for t, source in made.copies]
    return lines


def _array(constant: Tensor) -> str:
    """The definition of a constant in C99."""
    assert constant.data is not None
    values = [c_source.literal(value, constant.dtype) for value in constant.data.ravel().tolist()]
    rows = ["  " + ", ".join(values[i : i + 12]) for i in range(0, len(values), 12)]
    kind = c_source.type_name(constant.dtype)
    size = len(values)
    return f"static const {kind} CROSSBIT_ALIGNED {constant.name}[{size}] = {{\n" + ",\n".join(rows) + "\n};"


def _references(made: Program, name: str) -> str:
    """Names for constants that lie in one block of the library."""
    lines = [f'extern const char {name}_constants[] __attribute__((visibility("hidden")));']
    places, _ = workspace.in_turn(constant.bytes for constant in made.constants)
    for constant, at in zip(made.constants, places, strict=True):
        kind = c_source.type_name(constant.dtype)
        lines.append(f"#define {constant.name} ((const {kind} *)({name}_constants + {at}))")
    return "\n".join(lines)


_CONSTANTS = """\
  .section .rodata.{name}_constants,"a",%progbits
  .balign {alignment}
  .globl {name}_constants
  .hidden {name}_constants
{name}_constants:
  .incbin "{folder}/constants.bin"
  .section .note.GNU-stack,"",%progbits
"""


def exports(names: Sequence[str], library: str, at: Path) -> str:
    """The linker's option that leaves only these symbols of a library visible."""
    symbols = " ".join(f"{library}_{name};" for name in names)
    (at / "exports").write_text(f"{{ global: {symbols} local: *; }};\n")
    return f"--version-script={at}/exports"


def make_constants(made: Program, name: str, at: Path, tools: toolchain.Toolchain) -> None:
    """constants.o, with the constants one after the other."""
    with (at / "constants.bin").open("wb") as file:
        for constant in made.constants:
            assert constant.data is not None
            file.write(constant.data.tobytes().ljust(workspace.aligned(constant.bytes), b"\0"))
        file.write(bytes(0 if made.constants else workspace.ALIGNMENT))
    (at / "constants.s").write_text(_CONSTANTS.format(name=name, alignment=workspace.ALIGNMENT, folder=at))
    tools.run(*tools.cc, "-c", "-o", f"{at}/constants.o", f"{at}/constants.s")


def _link(made: Program, name: str, folder: Path, driver: str, kernels: Any, tools: toolchain.Toolchain) -> None:
    """lib<name>.so and lib<name>.a."""
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        (at / "driver.c").write_text(driver)
        kernels.write_to_file(str(at / "kernels.o"))
        code = ("-c", "-fPIC", "-std=c11", "-O2", "-ffunction-sections", "-fdata-sections", f"-I{folder}")
        # The driver must live on any CPU to say which instructions are missing.
        anywhere = [flag for flag in tools.cc if not flag.startswith(("-march=", "-mcpu=", "-mavx"))]
        tools.run(*anywhere, *code, "-o", f"{at}/driver.o", f"{at}/driver.c")
        make_constants(made, name, at, tools)
        objects = [f"{at}/{part}.o" for part in ("driver", "kernels", "constants")]
        small = ("-Wl,--gc-sections", "-Wl,-s", "-Wl,-z,max-page-size=4096", "-Wl,-z,defs")
        versions = "-Wl," + exports(("run_with", "strerror", "model"), name, at)
        tools.run(*tools.cc, "-shared", *small, versions, "-o", str(folder / f"lib{name}.so"), *objects, "-lm")
        tools.run(*tools.cc, "-nostdlib", "-r", "-Wl,-S", "-o", f"{at}/{name}.o", *objects)
        tools.run(*tools.ar, "rcs", str(folder / f"lib{name}.a"), f"{at}/{name}.o")
