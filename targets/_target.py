"""The record of a target: everything that schedules, the compiler and the loader ask about a CPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from targets._gpu import SOURCE, Gpu


@dataclass(frozen=True)
class ByteCounter:
    """The instructions that `tvm_ops.adder_network` uses where there is no vector popcount.

    Attributes:
        lanes: 32-bit lanes of its vectors.
        ternary_logic: LLVM's intrinsic of any function of three words, or '' where there is none.
        pair_sum, quad_sum: LLVM's intrinsics that sum products of neighbouring bytes, then of 16-bit words.
        look_up: LLVM's intrinsic that takes bytes out of a table of 16, one table for each 128 bits.
    """

    name: str
    lanes: int
    ternary_logic: str
    pair_sum: str
    quad_sum: str
    look_up: str

    @property
    def octets(self) -> int:
        """Bytes of a vector."""
        return 4 * self.lanes

    def sum_bytes(self, octets: Any) -> Any:
        """The sum of the four bytes of every lane: uint8x(4 lanes) -> int32x(lanes); a sum of two fits 16 bits."""
        from tvm import tirx

        ones8 = tirx.Broadcast(tirx.const(1, "int8"), 4 * self.lanes)
        ones16 = tirx.Broadcast(tirx.const(1, "int16"), 2 * self.lanes)
        pairs = tirx.call_llvm_pure_intrin(f"int16x{2 * self.lanes}", self.pair_sum, octets, ones8)
        return tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", self.quad_sum, pairs, ones16)


@dataclass(frozen=True)
class ByteProduct:
    """The instructions that `tvm_ops.byte_products` multiplies with: LLVM's intrinsics.

    Attributes:
        lanes: 32-bit lanes of its vectors.
        quads: that which adds four products of unsigned and signed bytes to every lane, exactly; '' without it.
        pairs: that which sums two such products to 16 bits, saturated.
        words: that which sums two products of 16-bit words to 32 bits.
    """

    name: str
    lanes: int
    quads: str
    pairs: str
    words: str


@dataclass(frozen=True)
class BytePopcount:
    """A popcount of 128-bit vectors that counts bytes, and how `tvm_ops.byte_sums` adds those up.

    Attributes:
        add: LLVM's intrinsic that adds the sums of 2 or 4 neighbouring bytes to 16- or 32-bit lanes.
        lane_bits: which of the two.
        operands: 'sums, bytes', 'bytes' (the result is to be added) or 'sums, bytes, factors' (of products).
        widen: that which sums neighbouring 16-bit lanes; '' where lanes have 32 bits.
        straight: words of a window in straight code, at most.
        fenced: words of it between two fences, without which LLVM spills; 0: it does not.
    """

    name: str
    add: str
    lane_bits: int
    operands: str
    straight: int
    fenced: int
    widen: str = ""

    @property
    def vector(self) -> str:
        return f"uint{self.lane_bits}x{128 // self.lane_bits}"

    @property
    def most(self) -> int:
        """How many vectors can be counted before a lane overflows."""
        return ((1 << self.lane_bits) - 1) // self.lane_bits

    def accumulate(self, sums: Any, octets: Any) -> Any:
        """``sums``, a `vector`, plus the bytes of uint8x16 that stand in each lane."""
        from tvm import tirx

        if self.operands == "bytes":
            return sums + tirx.call_llvm_pure_intrin(self.vector, self.add, octets)
        ones = [tirx.Broadcast(tirx.const(1, "uint8"), 16)] if self.operands == "sums, bytes, factors" else []
        return tirx.call_llvm_pure_intrin(self.vector, self.add, sums, octets, *ones)

    def total(self, sums: Any) -> Any:
        """`vector` -> int32x4."""
        from tvm import tirx

        wide = tirx.call_llvm_pure_intrin("uint32x4", self.widen, sums) if self.widen else sums
        return tirx.reinterpret("int32x4", wide)


@dataclass(frozen=True)
class ShiftInsert:
    """An instruction that shifts the lanes of a vector left, over the low bits of another's, and how
    `tvm_ops.ops.bitpack` makes words with it.

    Attributes:
        intrinsic: LLVM's name of it, for four lanes of 32 bits.
        amounts: whether it takes an amount for every lane.
        pairs: LLVM's name of that which adds neighbouring lanes of two vectors.
        lanes: 32-bit lanes of those, 2 or 4: so many words are made at once.
        pixels: how many are packed in straight code, at most.
        chained: whether each comparison is inserted into the next one, and not in pairs, pairs of pairs and so on:
            fewer registers, but longer for a core that runs ahead.
        fenced: whether LLVM, which would spill, is kept from mixing the words of two stores.
    """

    intrinsic: str
    amounts: bool
    pairs: str
    lanes: int
    pixels: int
    chained: bool = False
    fenced: bool = False

    def insert(self, high: Any, bits: int, low: Any) -> Any:
        """uint32x4: ``bits`` bits of ``low``, and above them those of ``high``."""
        from tvm import tirx

        amount = tirx.const(bits, "int32")
        amount = tirx.Broadcast(amount, 4) if self.amounts else amount
        return tirx.call_llvm_pure_intrin("uint32x4", self.intrinsic, low, high, amount)

    def sums(self, vectors: list[Any]) -> Any:
        """The sums of the lanes of up to ``lanes`` vectors of uint32x4, one in each lane."""
        from tvm import tirx

        parts = [*vectors, *[vectors[-1]] * (self.lanes - len(vectors))]
        if self.lanes == 2:
            parts = [tirx.Shuffle([vector], [first, first + 1]) for vector in parts for first in (0, 2)]
        while len(parts) > 1:
            neighbours = zip(parts[::2], parts[1::2], strict=True)
            parts = [tirx.call_llvm_pure_intrin(f"uint32x{self.lanes}", self.pairs, *pair) for pair in neighbours]
        return parts[0]


@dataclass(frozen=True)
class Target:
    """A CPU family as facts, or a GPU with the CPU beside it. Schedules read these fields and never the name.

    Attributes:
        machine: what ``platform.machine()`` says there; a name of ours where nothing can ask.
        triple, cpu, attributes, float_abi: LLVM's names: -mtriple, -mcpu, -mattr, -float-abi (32-bit ARM).
        features: the flags of /proc/cpuinfo without which the code is illegal.
        vector_bits: width of a vector register; 32 where there are none.
        registers: how many vector registers there are.
        popcount: how a vector of words is counted.
        source: where the numbers are from.
        cflags: what gcc and clang need to make code for this CPU.
        gnu_triple: what names of GNU cross tools start with; '' where there are none.
        zig_triple: what ``zig cc -target`` takes; '' where zig has no C library.
        tvm_runtime: whether TVM's runtime is there, and with it an operating system that loads shared libraries.
        cpu_part: 'CPU part' of /proc/cpuinfo (ARM), by which `host` tells cores with equal features apart.
        byte_counter: what to count with instead, if a vector popcount is slow.
        byte_popcount: what to add counts with, if a vector popcount counts bytes.
        byte_product: what to multiply codes of many bits with, instead of their planes.
        shift_insert: what to gather comparisons with, if no instruction makes a word of them.
        sign_bits: LLVM's intrinsic that makes a word of the signs of 32 bytes, if there is one.
        gpu: where the kernels run, if not on the CPU that the other fields describe.
    """

    name: str
    machine: str
    triple: str
    cpu: str
    attributes: tuple[str, ...]
    features: frozenset[str]
    vector_bits: int
    registers: int
    popcount: str
    source: str
    cflags: tuple[str, ...]
    gnu_triple: str = ""
    zig_triple: str = ""
    float_abi: str = ""
    tvm_runtime: bool = True
    cpu_part: str = ""
    byte_counter: ByteCounter | None = None
    byte_popcount: BytePopcount | None = None
    byte_product: ByteProduct | None = None
    shift_insert: ShiftInsert | None = None
    sign_bits: str = ""
    gpu: Gpu | None = None

    def __post_init__(self) -> None:
        if self.vector_bits % 32 or self.vector_bits < 32:
            raise ValueError(f"target {self.name}: vector_bits = {self.vector_bits} does not hold whole 32-bit words")
        if self.registers not in (8, 16, 32):
            raise ValueError(f"target {self.name}: registers = {self.registers}; a register file has 8, 16 or 32")
        if any(a[0] not in "+-" for a in self.attributes):
            raise ValueError(f"target {self.name}: every attribute starts with + or -, as LLVM writes them")

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector register."""
        return self.vector_bits // 32

    def without_intrinsics(self) -> Target:
        """The target without instructions that only LLVM can name: for C source, or where a GPU does the work."""
        return replace(self, byte_counter=None, byte_popcount=None, byte_product=None, shift_insert=None, sign_bits="")

    def with_gpu(self, gpu: Gpu) -> Target:
        """The target of a GPU beside this CPU, named after its architecture."""
        name = f"cuda-{gpu.arch.replace('_', '')}"
        return replace(self.without_intrinsics(), name=name, popcount=gpu.popcount, source=SOURCE, gpu=gpu)

    def tvm_target(self, threads: int) -> Any:
        """TVM's target for code that runs on ``threads`` cores.

        Raises:
            ValueError: LLVM does not know the CPU or an attribute (TVM itself would only warn and leave it out).
        """
        from tvm.target import Target as TvmTarget
        from tvm.target.codegen import llvm_get_cpu_features, llvm_is_valid_cpu

        if not llvm_is_valid_cpu(self.cpu, self.triple):
            raise ValueError(f"target {self.name}: LLVM does not know the CPU '{self.cpu}' for {self.triple}")
        machine = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu, "vector-width": self.vector_bits}
        for attribute in self.attributes:  # a name is known if switching it on does
            if attribute[1:] not in llvm_get_cpu_features(TvmTarget({**machine, "mattr": ["+" + attribute[1:]]})):
                raise ValueError(
                    f"target {self.name}: LLVM does not know the attribute '{attribute}' for {self.triple}"
                )
        abi = {"mfloat-abi": self.float_abi} if self.float_abi else {}
        cpu = {**machine, **abi, "mattr": list(self.attributes), "num-cores": threads}
        if self.gpu is None:
            return TvmTarget(cpu)
        limits = {"max_threads_per_block": 1024, "thread_warp_size": 32, "registers_per_block": 65536}
        shared = {"max_shared_memory_per_block": self.gpu.shared_bytes}
        return TvmTarget({"kind": "cuda", "arch": self.gpu.arch, **limits, **shared}, host=cpu)

    def missing_features(self) -> list[str]:
        """What this machine lacks to run code of this target; empty when it can."""
        if platform.machine() != self.machine:
            return [f"{'an' if self.machine[0] == 'a' else 'a'} {self.machine} CPU"]
        gpu = [missing] if self.gpu and (missing := self.gpu.missing()) else []
        return sorted(self.features - cpu_features()) + gpu


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo (empty where there is none)."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}


def cpu_features() -> frozenset[str]:
    """The flags of this CPU as Linux names them."""
    return frozenset(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())


def cpu_part() -> str:
    """The number that ARM gave this core, as Linux prints it ('0xd08'); '' on other CPUs."""
    return _cpuinfo().get("CPU part", "")


def cpu_name() -> str:
    """This CPU's model, for tables."""
    return _cpuinfo().get("model name", platform.machine())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
