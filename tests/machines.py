"""Where tests run what was built for a target: on this machine, or under QEMU, which refuses what a core lacks."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import emulator, toolchain
from targets import Target


def need(target: Target) -> None:
    """Skip the test where ``target``'s C compiler or a machine to run it is missing, and say which."""
    try:
        toolchain.find(target)
        if target.missing_features():
            emulator.command(target)
    except ValueError as error:
        pytest.skip(str(error))


def run(target: Target, program: Path, *args: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run an executable built for ``target``; what it prints is text. A signal is a negative ``returncode``.

    Raises:
        subprocess.TimeoutExpired: it took more than ``seconds``.
    """
    command = emulator.command(target) if target.missing_features() else []
    return subprocess.run([*command, str(program), *args], capture_output=True, text=True, timeout=seconds, check=False)


def call(target: Target, kernel: Any, arrays: list[np.ndarray], garbage: np.ndarray, folder: Path) -> np.ndarray:
    """What a kernel built by ``tirx.build`` for ``target`` writes over ``garbage``, run as a program in ``folder``."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    kernel.write_to_file(str(folder / "kernel.o"))
    specs = []
    for i, array in enumerate([*arrays, garbage]):
        (folder / f"{i}.bin").write_bytes(array.tobytes())
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        specs.append(",".join(map(str, (folder / f"{i}.bin", code, 8 * array.itemsize, *array.shape))))
    compiler, program = toolchain.find(target), folder / "program"
    includes = [f"-I{path}" for path in (find_include_path(), find_dlpack_include_path())]
    source, kernel_object = Path(__file__).with_name("kernel_main.c"), folder / "kernel.o"
    command = (*includes, str(source), str(kernel_object), "-o", str(program), "-static", "-lm")
    compiler.run(*compiler.cc, "-std=gnu11", "-O1", *command)
    done = run(target, program, *specs)
    assert done.returncode == 0, done
    return np.fromfile(folder / f"{len(arrays)}.bin", garbage.dtype).reshape(garbage.shape)
