"""How many cycles a core would take, by LLVM's model of it: blocks counted under QEMU, each timed by llvm-mca.

Emulated time says nothing about a core, and no board is needed for this: QEMU logs which blocks of the kernels ran how
often, exactly, and llvm-mca gives the cycles of each block, run again and again, in the scheduling model that LLVM has
of the core. The model knows the issue width, the pipes and the latencies, and no caches, memory or branch prediction.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import emulator
from targets import Target

MODELS = {"cortex-a53": "cortex-a53", "cortex-a72": "cortex-a72", "cortex-a76": "neoverse-n1", "cortex-a7": "cortex-a9"}
"""The model that stands for a target: LLVM has none of the A76 and the A7. That of the A72 is the A57's."""

_LLVM = 22
_ITERATIONS = 100
_FUNCTION = re.compile(r"^([0-9a-f]+) .* F \S+\s+([0-9a-f]+) (?:\.hidden )?(\S+)$", re.M)
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*?)\s*(?://.*|@.*)?$")
_BRANCH = re.compile(r"(b|bl|bx|blx|br|blr|ret|cbn?z|tbn?z|b\.?(eq|ne|hs|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|cs|cc|al))$")


@dataclass(frozen=True)
class Count:
    """What a function executed: instructions, and the cycles that the model gives them."""

    instructions: int
    cycles: float


@dataclass(frozen=True)
class Block:
    """Instructions that always run together, and how often they did."""

    runs: int
    lines: tuple[str, ...]


def tools(target: Target) -> tuple[list[str], str, str]:
    """The emulator's command, llvm-objdump and llvm-mca.

    Raises:
        ValueError: one is missing, or LLVM has no model for the target.
    """
    if target.name not in MODELS:
        raise ValueError(f"LLVM has no model of {target.name} here: choose one of {', '.join(MODELS)}")
    names = (f"llvm-objdump-{_LLVM}", f"llvm-mca-{_LLVM}")
    for name in names:
        if shutil.which(name) is None:
            raise ValueError(f"{name} is missing: apt-get install llvm-{_LLVM}, or `scripts/setup cross` as root")
    return emulator.command(target), *names


def count(
    target: Target, program: Path, arguments: Sequence[str], functions: Sequence[str], seconds: float | None = None
) -> dict[str, Count]:
    """Run a static program under QEMU and model what its ``functions`` did.

    Args:
        seconds: that the program may run.

    Raises:
        ValueError: a tool is missing.
        subprocess.CalledProcessError: a tool or the program failed.
        subprocess.TimeoutExpired: the program ran longer.
    """
    counted = {}
    for name, found in blocks(target, program, arguments, functions, seconds).items():
        times = cycles(target, [block.lines for block in found])
        instructions = sum(block.runs * len(block.lines) for block in found)
        counted[name] = Count(instructions, sum(b.runs * time for b, time in zip(found, times, strict=True)))
    return counted


def blocks(
    target: Target, program: Path, arguments: Sequence[str], functions: Sequence[str], seconds: float | None = None
) -> dict[str, list[Block]]:
    """The blocks of each function that ran. Arguments and errors as of `count`."""
    qemu, objdump, _ = tools(target)
    code: dict[str, dict[int, str]] = {}
    for first, size, name in _FUNCTION.findall(_output(objdump, "-t", str(program))):
        if name in functions:  # by address: a listing by name ends where constants stand in the code
            span = (f"--start-address=0x{first}", f"--stop-address={int(first, 16) + int(size, 16):#x}")
            listing = _output(objdump, "-d", "--no-show-raw-insn", *span, str(program)).splitlines()
            code[name] = {int(found[1], 16): found[2] for found in map(_INSTRUCTION.match, listing) if found}
    executed = _executed(qemu, program, arguments, [a for lines in code.values() for a in lines], seconds)
    return {name: _blocks(lines, executed) for name, lines in code.items()}


def cycles(target: Target, blocks: Sequence[Sequence[str]]) -> list[float]:
    """Of one run of each block among many, by llvm-mca."""
    if not blocks:
        return []
    _, _, mca = tools(target)
    arm32 = target.machine == "armv7l"
    mark = "@" if arm32 else "//"
    text = [".syntax unified\n.fpu neon-vfpv4" if arm32 else ".arch_extension dotprod"]
    for lines in blocks:
        plain = [re.sub(r"#?0x[0-9a-f]+ <.*>", "somewhere", line) for line in lines]
        text += [f"{mark} LLVM-MCA-BEGIN", *plain, f"{mark} LLVM-MCA-END"]
    switches = (f"-iterations={_ITERATIONS}", "-noalias", "-skip-unsupported-instructions=lack-sched")
    views = ("-instruction-info=false", "-resource-pressure=false")
    command = (mca, f"-mtriple={target.triple}", f"-mcpu={MODELS[target.name]}", *switches, *views)
    done = subprocess.run(command, input="\n".join([*text, ""]), capture_output=True, text=True, check=False)
    if done.returncode < 0 and len(blocks) > 1:  # with the A9's model, llvm-mca 22 crashes on some blocks
        half = len(blocks) // 2
        return cycles(target, blocks[:half]) + cycles(target, blocks[half:])
    if done.returncode < 0 and len(blocks[0]) > 1:
        half = len(blocks[0]) // 2
        return [sum(cycles(target, [blocks[0][:half], blocks[0][half:]]))]
    done.check_returncode()
    found = re.findall(r"Total Cycles:\s+(\d+)", done.stdout)
    assert len(found) == len(blocks), done.stdout
    return [int(total) / _ITERATIONS for total in found]


def _executed(
    qemu: Sequence[str], program: Path, arguments: Sequence[str], addresses: Sequence[int], seconds: float | None
) -> Counter[int]:
    """How often each instruction ran. QEMU logs what it translates and every run of a translation."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        kernels = f"{min(addresses):#x}..{max(addresses):#x}"
        switches = ["-d", "in_asm,exec,nochain", "-D", str(log), "-dfilter", kernels]
        _output(*qemu, *switches, str(program), *arguments, seconds=seconds)
        translated: dict[int, list[int]] = {}
        traces: Counter[str] = Counter()  # a million lines, of which few differ
        first = 0
        with log.open() as lines:
            for line in lines:
                if line.startswith("Trace"):
                    traces[line] += 1
                elif line.startswith("IN:"):
                    first = 0
                elif line.startswith("0x"):
                    address = int(line.split(":")[0], 16)
                    first = first or address
                    if first == address:
                        translated[first] = []
                    translated[first].append(address)
    executed: Counter[int] = Counter()
    for line, times in traces.items():
        for address in translated[int(line.split("[")[1].split("/")[1], 16)]:
            executed[address] += times
    return executed


def _blocks(lines: dict[int, str], executed: Counter[int]) -> list[Block]:
    found: list[Block] = []
    current: list[str] = []
    runs = 0

    def close() -> None:
        if current and runs:
            found.append(Block(runs, tuple(current)))
        current.clear()

    for address, line in lines.items():
        if executed[address] != runs:
            close()
            runs = executed[address]
        current.append(line)
        if _BRANCH.match(line.split()[0]):
            close()
    close()
    return found


def _output(*command: str, seconds: float | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout
