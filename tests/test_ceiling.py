"""The loops: they run, and the machine code does what they are named for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from machines import need, run

import targets
from pipeline import ceiling, toolchain

SOURCE = Path(ceiling.__file__).with_suffix(".c")
MAIN = """
#include <stdio.h>
double binary_macs_per_second(long), integer_macs_per_second(long), float_macs_per_second(long);
double read_bytes_per_second(long);
int main(void) {
  printf("%g %g %g ", binary_macs_per_second(1000), integer_macs_per_second(1000), float_macs_per_second(1000));
  printf("%g", read_bytes_per_second(1000));
}
"""


def test_this_machine_has_a_ceiling() -> None:
    loops = ceiling.loops(targets.host())
    rates = {kind: loop() for kind, loop in loops.items()}
    assert set(rates) == {"binary", "integer", "float"}
    assert 1e8 < rates["float"] < rates["integer"] < rates["binary"] < 1e14


def test_the_nearest_cache_is_read_faster_than_memory() -> None:
    reading = ceiling.reading(targets.host())
    assert 1e8 < reading(1 << 27) < reading(1 << 13) < 1e13
    assert reading(1) > 0  # of a whole round of loads


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512bw", "cortex-a7", "cortex-a72", "cortex-a76"])
def test_loops_run_on_every_kind_of_vector(name: str, tmp_path: Path) -> None:
    target = targets.load(name)
    need(target)
    tools, program = toolchain.find(target), tmp_path / "program"
    (tmp_path / "main.c").write_text(MAIN)
    tools.run(*tools.cc, "-O3", "-static", str(SOURCE), str(tmp_path / "main.c"), "-o", str(program))
    done = run(target, program)
    assert done.returncode == 0 and all(float(rate) > 0 for rate in done.stdout.split())


@pytest.mark.parametrize(
    ("name", "count", "product", "fma"),
    [
        ("x86-avx2", "vpshufb .*ymm", "vpmaddubsw .*ymm", "vfmadd.*ymm"),
        ("x86-avx512bw", "vpshufb .*zmm", "vpmaddubsw .*zmm", "vfmadd.*zmm"),
        ("x86-avx512vnni", "vpshufb .*zmm", "vpdpbusd .*zmm", "vfmadd.*zmm"),
        ("x86-avx512", "vpopcntq .*zmm", "vpdpbusd .*zmm", "vfmadd.*zmm"),
        ("cortex-a72", r"cnt v\d+\.16b", r"umlal v\d+\.8h", r"fmla v\d+\.4s"),
        ("cortex-a76", r"cnt v\d+\.16b", r"udot v\d+\.4s", r"fmla v\d+\.4s"),
        ("cortex-a7", r"vcnt\.8 q", r"vmlal\.u8 q", r"vfma\.f32 q"),
    ],
)
def test_loops_use_the_widest_vectors(name: str, count: str, product: str, fma: str, tmp_path: Path) -> None:
    target = targets.load(name)
    try:
        tools = toolchain.find(target)
    except ValueError as error:
        pytest.skip(str(error))
    tools.run(*tools.cc, "-O3", "-S", str(SOURCE), "-o", str(tmp_path / "ceiling.s"))
    code = " ".join(re.sub(r"[ \t]+", " ", (tmp_path / "ceiling.s").read_text()).splitlines(keepends=True))
    assert all(re.search(each, code) for each in (count, product, fma))
