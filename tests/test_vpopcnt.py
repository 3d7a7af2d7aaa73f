"""`x86-avx512` on a CPU that has AVX-512 but for its population counts, whose faults a handler turns into counts.

Everything else runs as it is, so that what is compiled for the target is checked where no CPU of it is at hand. Each
count takes a fault, some thousands of cycles: this says nothing of speed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import test_exactness
import test_ops

import targets
from targets import _target

COUNTS = frozenset({"avx512_vpopcntdq", "avx512_bitalg"})
NATIVE = targets.cpu_features() >= COUNTS


def shared(source: Path, folder: Path) -> ctypes.CDLL:
    library = folder / f"{source.stem}.so"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    lacking = set(targets.load("x86-avx512").missing_features()) - COUNTS
    if lacking:
        pytest.skip(f"this CPU lacks {sorted(lacking)}")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing, which compiles the handler: run `apt-get install gcc`")
    return shared(Path(__file__).with_name("vpopcnt.c"), tmp_path_factory.mktemp("vpopcnt"))


@pytest.fixture
def count(handler: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The host is `x86-avx512`; says how many instructions were emulated until now."""
    features = targets.cpu_features()
    monkeypatch.setattr(_target, "cpu_features", lambda: features | COUNTS)
    assert targets.host().name == "x86-avx512"
    before = handler.count()
    handler.begin()
    yield lambda: handler.count() - before
    handler.end()


# The handler itself ----------------------------------------------------------------------------------------------

PLACES = {  # (how it is written, what it needs, the offset from %rdi in bytes), of an operand in memory
    "base": ("(%rdi)", "", 0),
    "base and 8 bits": ("{scaled}(%rdi)", "", None),
    "base and 32 bits": ("1027(%rdi)", "", 1027),
    "r12": ("(%r12)", "mov %rdi, %r12", 0),
    "r13": ("(%r13)", "mov %rdi, %r13", 0),
    "index": ("-8(%rax,%r9,4)", "mov %rdi, %rax; mov $5, %r9d", 12),
    "r12 is the index": ("(%rbp,%r12,8)", "mov %rdi, %rbp; mov $3, %r12d", 24),
    "no base": ("40(,%rdi)", "", 40),
    "rip": ("1f(%rip)", "", None),
}
TABLE = [0x0123456789ABCDEF, 0xF0, 3, 2**64 - 1, 5, 2**63, 0xFFFF, 0]  # beside the instruction, for "rip"


def program(rng: np.random.Generator, op: str, bits: int) -> tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """One instruction between a load and a store of all registers, and what it must make of 32 x 64 bytes and masks."""
    element = {"b": 1, "w": 2, "d": 4, "q": 8}[op]
    to, mask, zeroing = int(rng.integers(32)), int(rng.integers(8)), bool(rng.integers(2))
    register = {128: "xmm", 256: "ymm", 512: "zmm"}[bits]
    source, prepare, table = int(rng.integers(32)), "", ""
    offset: int | None = 64 * source
    many = False
    written = f"%{register}{source}"
    if rng.integers(4):
        place = str(rng.choice(list(PLACES)))
        many = element >= 4 and bool(rng.integers(2))
        scaled = 7 * (element if many else bits // 8)
        written, prepare, offset = PLACES[place]
        written = written.format(scaled=scaled)
        if place == "base and 8 bits":
            offset = scaled
        if place == "rip":
            table = f"1: .quad {', '.join(map(str, TABLE))}"
        if many:
            written += f"{{1to{bits // 8 // element}}}"
    suffix = (f"{{%k{mask}}}" + "{z}" * zeroing) if mask else ""
    text = f"{prepare}; vpopcnt{op} {written}, %{register}{to}{suffix}; jmp 2f; {table}; 2:"

    def expected(registers: np.ndarray, masks: np.ndarray) -> np.ndarray:
        memory = np.array(TABLE, np.uint64).tobytes() if table else registers.tobytes()
        start = offset or 0
        data = memory[start : start + element] * 64 if many else memory[start : start + 64]
        result = registers.copy()
        old = result[to].tobytes()
        lanes = [0] * (64 // element)
        for i in range(bits // 8 // element):
            if not mask or int(masks[mask]) >> i & 1:
                lanes[i] = int.from_bytes(data[i * element : (i + 1) * element], "little").bit_count()
            elif not zeroing:
                lanes[i] = int.from_bytes(old[i * element : (i + 1) * element], "little")
        result[to] = np.frombuffer(b"".join(lane.to_bytes(element, "little") for lane in lanes), np.uint8)
        return result

    return text, expected


def test_the_handler_does_what_the_instructions_do(
    count: Callable[[], int], rng: np.random.Generator, tmp_path: Path
) -> None:
    """Random registers, addresses, masks: the result is right, and no other register changes."""
    programs = [program(rng, str(rng.choice(list("bwdq"))), int(rng.choice([128, 256, 512]))) for _ in range(200)]
    lines = []
    for i, (text, _) in enumerate(programs):  # (%rdi: 32 registers, masks; %rsi: where registers go)
        saved = ("%rbp", "%r12", "%r13")
        lines += [f".globl case{i}", f"case{i}:", *(f"push {r}" for r in saved)]
        lines += [f"vmovdqu64 {64 * r}(%rdi), %zmm{r}" for r in range(32)]
        lines += [f"kmovq {2048 + 8 * k}(%rdi), %k{k}" for k in range(1, 8)]
        lines += text.split("; ")
        lines += [f"vmovdqu64 %zmm{r}, {64 * r}(%rsi)" for r in range(32)]
        lines += [*(f"pop {r}" for r in reversed(saved)), "vzeroupper", "ret"]
    source = tmp_path / "cases.s"
    source.write_text("\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""]))
    cases = shared(source, tmp_path)
    for i, (text, expected) in enumerate(programs):
        registers = rng.integers(0, 256, (32, 64), np.uint8)
        masks = rng.integers(0, 1 << 64, 8, np.uint64)
        memory, found = np.concatenate([registers.ravel(), masks.view(np.uint8)]), np.zeros((32, 64), np.uint8)
        cases[f"case{i}"](ctypes.c_void_p(memory.ctypes.data), ctypes.c_void_p(found.ctypes.data))
        np.testing.assert_array_equal(found, expected(registers, masks), text)
    assert count() == (0 if NATIVE else len(programs))


def test_another_fault_is_not_swallowed(handler: ctypes.CDLL, tmp_path: Path) -> None:
    source = tmp_path / "fault.c"
    source.write_text("void begin(void); int main(void) { begin(); __builtin_trap(); }")
    program = tmp_path / "fault"
    subprocess.run(["gcc", source, Path(__file__).with_name("vpopcnt.c"), "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == -4  # SIGILL


# What is compiled for the target ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["floats", "bits"])
@pytest.mark.parametrize("case", list(test_ops.CASES)[1:])  # the first has one filter, and no vectors
def test_convolution(case: str, to: str, count: Callable[[], int], rng: np.random.Generator) -> None:
    test_ops.test_convolution(case, True, to, rng)
    assert count() or NATIVE


@pytest.mark.parametrize("w", test_ops.WEIGHTS)
@pytest.mark.parametrize("a", ["1a", "ternary a", "2a"])  # with more bits, bytes are multiplied
@pytest.mark.usefixtures("count")
def test_convolution_of_pairs_of_codes(a: str, w: str, rng: np.random.Generator) -> None:
    test_ops.test_convolution_of_every_pair_of_codes(a, w, rng)


@pytest.mark.usefixtures("count")
def test_sums_beyond_16_bits(rng: np.random.Generator) -> None:
    test_ops.test_sums_beyond_16_bits(True, rng)


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("kernel", [k for k in test_ops.KERNELS if k.startswith("bitserial")])
@pytest.mark.usefixtures("count")
def test_schedules_that_tuning_draws(kernel: str, draw: int, rng: np.random.Generator) -> None:
    test_ops.test_every_schedule_that_tuning_draws_gives_the_same(kernel, draw, rng)


@pytest.mark.parametrize("case", range(5))
@pytest.mark.usefixtures("count")
def test_one_layer(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """torch == ONNX Runtime == compiled code."""
    test_exactness.test_float_output_of_one_layer(case, rng, tmp_path)


@pytest.mark.parametrize("case", range(2))
@pytest.mark.usefixtures("count")
def test_chain(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    test_exactness.test_chains_of_binary_layers(case, rng, tmp_path)
