"""Instructions counted under QEMU against programs whose counts are known."""

from __future__ import annotations

from pathlib import Path

import machines
import numpy as np
import pytest

import targets
from pipeline import cycle_model, toolchain

# f(n): a loop, an instruction of which runs every second time, then a constant amid the code.
CODE = {
    "aarch64": """
    .globl f
    .type f, %function
    f:  mov w1, #0
    1:  tbz w0, #0, 2f
        add w1, w1, #1
    2:  subs w0, w0, #1
        b.ne 1b
        b 3f
        .word 0
    3:  ret
        .size f, . - f
    """,
    "armv7l": """
    .syntax unified
    .arm
    .type f, %function
    .globl f
    f:  mov r1, #0
    1:  tst r0, #1
        beq 2f
        add r1, r1, #1
    2:  subs r0, r0, #1
        bne 1b
        b 3f
        .word 0
    3:  bx lr
        .size f, . - f
    """,
}
MAIN = "#include <stdlib.h>\nint f(int);\nint main(int count, char **words) { f(atoi(words[1])); return 0; }\n"


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a76", "cortex-a7"])
def test_instructions_are_counted_exactly(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    target = targets.load(name)
    machines.need(target)
    try:
        cycle_model.tools(target)
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "main.c").write_text(MAIN)
    (tmp_path / "f.s").write_text(CODE[target.machine])
    tools, program = toolchain.find(target), tmp_path / "program"
    tools.run(*tools.cc, "-static", "-o", str(program), f"{tmp_path}/main.c", f"{tmp_path}/f.s")
    times = int(rng.integers(1000, 100_000))
    count = cycle_model.count(target, program, [str(times)], ["f"])["f"]
    always = 3 if target.machine == "aarch64" else 4
    assert count.instructions == 3 + always * times + (times + 1) // 2
    assert count.instructions / 4 < count.cycles < count.instructions * 2


def test_a_core_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no model of x86-avx2"):
        cycle_model.tools(targets.load("x86-avx2"))
