"""Runs CUDA C++ that TVM generates on the CPU: every thread, barrier, warp collective and asynchronous copy of it.

There is no CUDA here, only g++. `emulate_source` rewrites a translation unit of `tvm.backend.cuda.export_cuda_host`
(inline PTX becomes calls, shared arrays come from an arena, tensors may be on the CPU) and compiles it against
`include/` and `runtime.cpp`. A kernel that does what a GPU does not define or allow (races in shared memory, reads past
an array or a tensor, misaligned vectors, divergent barriers, copies read before they are waited for) raises
RuntimeError with a sentence. Lines in messages are those of the rewritten source, kept beside the library.

`CUDA_EMULATOR_ORDER` sets the order of blocks and threads: 0 first to last, 1 last to first, more: a random one.
Not emulated: wmma, wgmma, TMA, mbarrier, clusters, half floats, atomics, `<<<>>>`. Blocks and warps take turns, and
races in global memory are not looked for. Fragments of ldmatrix and mma lie as the PTX ISA says.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import tvm
import tvm_ffi

HERE = Path(__file__).parent
KIB = 1024
SHARED_LIMIT = {  # bytes a block may have, by compute capability
    "75": 64 * KIB,
    **dict.fromkeys(("80", "87"), 163 * KIB),
    **dict.fromkeys(("86", "89", "120"), 99 * KIB),
    **dict.fromkeys(("90", "100", "103", "110"), 227 * KIB),
}
INCLUDE = [f"-I{HERE / 'include'}", *(f"-I{p}" for p in tvm_ffi.libinfo.include_paths())]
COMPILE = [
    "g++",
    "-std=c++17",
    "-O2",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    *INCLUDE,
]
# The runtime implements the sanitizers' entry points; registers that nothing wrote hold junk, as on a GPU.
CHECK = [
    "-fno-strict-aliasing",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment",
    "-ftrivial-auto-var-init=pattern",
    "-Werror=frame-larger-than=32768",
]


def missing() -> str:
    """Why nothing can be emulated on this machine, or nothing."""
    flags = [flag for flag in CHECK if not flag.startswith("-Werror")]
    command = ["g++", *flags, "-xc++", "-fsyntax-only", "/dev/null"]
    if shutil.which("g++") and subprocess.run(command, capture_output=True).returncode == 0:
        return ""
    return "emulated CUDA needs g++ 12 or newer: `scripts/setup cross` as root installs it"


def cuda_source(mod: tvm.IRModule | tvm.tirx.PrimFunc, arch: str) -> str:
    """The CUDA C++ of a scheduled module, kernels and the host functions that launch them, for e.g. ``"sm_80"``."""
    from tvm.backend.cuda import export_cuda_host

    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "cuda_host"})
    with target:
        return export_cuda_host(tvm.compile(mod, target=target).mod)


def build(mod: tvm.IRModule | tvm.tirx.PrimFunc, arch: str) -> tvm_ffi.Module:
    """A scheduled module compiled for ``arch`` and emulated: its functions take CPU tensors."""
    return load(cuda_source(mod, arch), arch)


def load(source: str, arch: str) -> tvm_ffi.Module:
    """A CUDA translation unit of `cuda_source`, emulated."""
    with tempfile.TemporaryDirectory() as folder:
        return tvm_ffi.load_module(str(emulate_source(source, Path(folder) / "kernels.so", shared=True, arch=arch)))


def emulate_source(source: str, path: Path, shared: bool, arch: str = "sm_80", flags: Sequence[str] = ()) -> Path:
    """Compile a CUDA translation unit for the CPU: a shared library, or an object to link (with ``-ltvm_ffi``).

    It exports `__tvm_ffi_<name>` for each host function, which take CPU tensors. Returns ``path``; the rewritten
    source is beside it. ``flags`` go to g++. Raises ValueError for what is not emulated, RuntimeError with g++'s words.
    """
    code = arch.removeprefix("sm_").rstrip("a")
    if code not in SHARED_LIMIT:
        raise ValueError(f"{arch} is not emulated; these are: {', '.join('sm_' + a for a in SHARED_LIMIT)}")
    rewritten, kernels, runtime = (path.with_suffix(suffix) for suffix in (".cpp", ".kernels.o", ".runtime.o"))
    rewritten.write_text(rewrite(source, int(code)) + f"\nconst size_t emu::shared_limit = {SHARED_LIMIT[code]};\n")
    headers, runtime_object = once()
    run([*COMPILE, *CHECK, f"-D__CUDA_ARCH__={code}0", "-include", headers, *flags, "-c", rewritten, "-o", kernels])
    runtime.write_bytes(runtime_object)
    if shared:
        library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
        run(["g++", "-shared", kernels, runtime, "-o", path, f"-L{library}", "-ltvm_ffi"])
    else:
        # Each object keeps its runtime to itself, so that two may be linked into one library.
        run(["g++", "-r", "-nostdlib", "-Wl,--force-group-allocation", kernels, runtime, "-o", path])
        run(["objcopy", "--localize-hidden", path])
    return path


@functools.cache
def once() -> tuple[Path, bytes]:
    """What all kernels share: a header that is compiled already, and the runtime's object."""
    folder = tempfile.mkdtemp(prefix="cuda-emulator-")
    atexit.register(shutil.rmtree, folder)
    header = Path(folder) / "kernels.h"
    header.write_text(f'#include "{HERE}/include/kernels.h"\n')
    run([*COMPILE, *CHECK, "-x", "c++-header", header])
    run([*COMPILE, "-c", HERE / "runtime.cpp", "-o", Path(folder) / "runtime.o"])
    return header, (Path(folder) / "runtime.o").read_bytes()


def run(command: list[object]) -> None:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr[:4000]}")


# ---- rewriting


ALIGNED = r"(?:(?:__align__|alignas)\((\d+)\) )?"
TYPE = r"([\w ]+?)"


def rewrite(source: str, arch: int) -> str:
    """C++ for the CPU of a CUDA translation unit, line for line. ``arch``: 80 for sm_80."""
    source = rewrite_asm(source, arch)
    source = re.sub(rf"\bextern __shared__ {ALIGNED}{TYPE} ?(\w+)\[\];", dynamic_array, source)
    sites = itertools.count()
    source = re.sub(
        rf"{ALIGNED}\b__shared__ {ALIGNED}{TYPE} (\w+)((?:\[\w+\])*);", lambda m: shared_array(m, next(sites)), source
    )
    if left := re.search(r".*\b__shared__\b.*", source):
        raise ValueError(f"a declaration of shared memory that is not emulated: {left[0].strip()}")
    if arch < 80 and (name := re.search(r"\b__reduce_\w+_sync\b", source)):
        raise ValueError(f"{name[0]} needs sm_80, not sm_{arch}")
    source = source.replace(
        ".device.device_type) == 2)", ".device.device_type) == 1)"
    )  # kDLCUDA: tensors are on the CPU
    begin = "TVM_FFI_SAFE_CALL_BEGIN();"
    source = source.replace(begin, f"{begin} emu::Arguments emu_arguments(args, num_args);")
    ours = r"(void \*t\[(\d+)\];)"  # of a function of `pipeline.cuda_kernel.packed`
    return re.sub(ours, r"emu::Arguments emu_arguments(arguments, \2); \1", source)


def dynamic_array(match: re.Match[str]) -> str:
    alignment, kind, name = match.groups()
    return f"auto* {name} = static_cast<{kind}*>(emu::dynamic_array({alignment or 16}));"


def shared_array(match: re.Match[str], site: int) -> str:
    before, after, kind, name, extents = match.groups()
    alignment = before or after or f"alignof({kind})"
    made = f'emu::shared_array({site}, "{name}", sizeof({kind}{extents}), {alignment})'
    return f"auto& {name} = *static_cast<{kind}(*){extents}>({made});"


# ---- inline PTX

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
REGISTERS = {
    "pred": "bool",
    "u32": "uint32_t",
    "b32": "uint32_t",
    "s32": "int32_t",
    "u64": "uint64_t",
    "b64": "uint64_t",
}
BYTES = {"u32": "uint8_t", "s32": "int8_t"}


def warp_wide(name: str) -> Callable[[re.Match[str], list[str]], str]:
    return lambda m, o: f'emu::{name.format(*m.groups())}("{m[0]}", __LINE__, {", ".join(o)})'


def cp_async(m: re.Match[str], o: list[str]) -> str:
    # A predicate (bool) says to ignore the source, a number how many of its bytes are read; zeros fill the rest.
    return f"emu::cp_async<{16 if m[1] == 'cg' else 4}>({', '.join(o)})"


# An instruction, the oldest architecture that has it, and its C++ from the match and the operands.
INSTRUCTIONS: list[tuple[str, int, Callable[[re.Match[str], list[str]], str]]] = [
    (r"mma\.sync\.aligned\.m8n8k128\.row\.col\.s32\.b1\.b1\.s32\.(xor)\.popc", 75, warp_wide("mma<emu::dot_{0}>")),
    (
        r"mma\.sync\.aligned\.(?:m8n8k128|m16n8k128|m16n8k256)\.row\.col\.s32\.b1\.b1\.s32\.(and|xor)\.popc",
        80,
        warp_wide("mma<emu::dot_{0}>"),
    ),
    (r"mma\.sync\.aligned\.m8n8k16\.row\.col\.s32\.s8\.s8\.s32", 75, warp_wide("mma<emu::dot_s8>")),
    (r"mma\.sync\.aligned\.m16n8k(?:16|32)\.row\.col\.s32\.s8\.s8\.s32", 80, warp_wide("mma<emu::dot_s8>")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.shared(?:::cta)?\.b16", 75, warp_wide("ldmatrix<false>")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.trans\.shared(?:::cta)?\.b16", 75, warp_wide("ldmatrix<true>")),
    (r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?", 80, cp_async),
    (r"cp\.async\.commit_group", 80, lambda m, o: "emu::commit_copies()"),
    (r"cp\.async\.wait_group", 80, lambda m, o: f"emu::wait_copies({o[0]})"),
    (r"cp\.async\.wait_all", 80, lambda m, o: "emu::wait_all_copies()"),
    (r"st\.shared(?:\.v[24])?\.[bsuf]32", 50, lambda m, o: f"emu::st_shared({', '.join(o)})"),
    (
        r"setp\.(eq|ne|lt|le|gt|ge)\.([bsu]32)",
        50,
        lambda m, o: f"{o[0]} = {REGISTERS[m[2]]}({o[1]}) {COMPARE[m[1]]} {REGISTERS[m[2]]}({o[2]})",
    ),
    (r"selp\.[bsu]32", 50, lambda m, o: f"{o[0]} = {o[3]} ? {o[1]} : {o[2]}"),
    (r"mov\.[bsu]32", 50, lambda m, o: f"{o[0]} = {o[1]}"),
    (r"popc\.b32", 50, lambda m, o: f"{o[0]} = __popc({o[1]})"),
    (r"lop3\.b32", 50, lambda m, o: f"{o[0]} = emu::lop3({', '.join(o[1:])})"),
    (
        r"dp4a\.([su]32)\.([su]32)",
        61,
        lambda m, o: f"{o[0]} = emu::dot_bytes<{BYTES[m[1]]}, {BYTES[m[2]]}>({o[1]}, {o[2]}) + {o[3]}",
    ),
    (
        r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu]32)",
        80,
        lambda m, o: f"{o[0]} = __reduce_{m[1]}_sync({o[2]}, {REGISTERS[m[2]]}({o[1]}), __LINE__)",
    ),
]
ASM = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|\b(?:asm|__asm__)\s*(?:(?:volatile|__volatile__)\s*)?\(""", re.S
)


def rewrite_asm(source: str, arch: int) -> str:
    """Every `asm volatile(template : outputs : inputs : clobbers)` becomes a block of C++."""
    out, at = [], 0
    while match := ASM.search(source, at):
        out.append(source[at : match.start()])
        at = match.end()
        if match[0].endswith("(") and not match[0].startswith(("/", '"')):
            end = closing(source, at)
            sections = split(source[at:end], ":")
            out.append(asm_block(sections, arch) + "\n" * source.count("\n", match.start(), end))
            at = end + 1
        else:
            out.append(match[0])
    return "".join(out) + source[at:]


def closing(text: str, at: int) -> int:
    """Where the bracket that was open before ``at`` closes."""
    depth = 1
    for token in re.finditer(r'"(?:\\.|[^"\\])*"|[()\[\]{}]', text[at:]):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return at + token.start()
    raise ValueError("an asm statement without an end")


def split(text: str, separator: str) -> list[str]:
    """The parts of ``text`` between separators outside strings and brackets, without white space around them."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf'"(?:\\.|[^"\\])*"|[()\[\]{{}}{separator}]', text):
        if token[0] == separator and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[0], 0)
    return [*parts, text[start:].strip()]


def asm_block(sections: list[str], arch: int) -> str:
    template = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', sections[0])).replace("\\n", " ").replace("\\t", " ")
    outputs, inputs = ([o for o in split(s, ",") if o] for s in (*sections[1:3], *[""] * (3 - len(sections))))
    code = []
    for i, operand in enumerate([*outputs, *inputs]):
        match = re.fullmatch(r'"[=+&]*[rlnfh]"\s*(\(.*\))', operand, re.S)
        if not match:
            raise ValueError(f"an asm operand that is not emulated: {operand}")
        code.append(f"{'auto&' if i < len(outputs) else 'const auto'} emu_operand{i} = {' '.join(match[1].split())};")
    declared: set[str] = set()
    for statement in template.split(";"):
        statement = re.sub(r"^[{}\s]+", "", statement).strip()  # PTX's blocks; no instruction begins with a bracket
        if statement:
            code.append(instruction(statement, len(outputs), declared, arch) + ";")
    return f"do {{ {' '.join(code)} }} while (0)"


def instruction(statement: str, outputs: int, declared: set[str], arch: int) -> str:
    """C++ of one PTX statement; ``declared`` collects the registers of the block."""
    if register := re.fullmatch(r"\.reg\s+\.(\w+)\s+([\w\s,]+)", statement):
        if register[1] not in REGISTERS:
            raise ValueError(f"a PTX register that is not emulated: {statement}")
        names = split(register[2], ",")
        declared.update(names)
        return f"{REGISTERS[register[1]]} {', '.join(names)}"
    parts = re.fullmatch(r"(?:@(!?\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
    if not parts:
        raise ValueError(f"a PTX statement that is not emulated: {statement}")
    guard, mnemonic, rest = parts.groups()
    for pattern, oldest, emit in INSTRUCTIONS:
        if match := re.fullmatch(pattern, mnemonic):
            if arch < oldest:
                raise ValueError(f"PTX instruction {mnemonic} needs sm_{oldest}, not sm_{arch}")
            operands = [operand(o, outputs, declared) for o in split(rest, ",") if o]
            return (f"if ({guard}) " if guard else "") + emit(match, operands)
    raise ValueError(f"PTX instruction {mnemonic} is not emulated")


def operand(text: str, outputs: int, declared: set[str]) -> str:
    if text.startswith("{"):
        names = split(text[1:-1], ",")
        written = all(re.fullmatch(r"%\d+", n) and int(n[1:]) < outputs for n in names)
        registers = ", ".join(operand(n, outputs, declared) for n in names)
        return f"emu::{'destinations' if written else 'sources'}({registers})"
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return f"({operand(base.strip(), outputs, declared)} + {offset.strip() or 0})"
    if re.fullmatch(r"%\d+", text):
        return f"emu_operand{text[1:]}"
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text) or text in declared:
        return text
    raise ValueError(f"a PTX operand that is not emulated: {text}")
