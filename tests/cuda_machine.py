"""GPUs for tests: NVIDIA's compiler, where it is installed, and an emulated GPU with a compiler of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi

import targets
from pipeline import cuda_toolchain, gpu, toolchain
from pipeline.cuda_toolchain import Nvcc
from targets import Target

# What an app would do with the CUDA runtime, for ctypes.
_APP = """
extern "C" __attribute__((visibility("default"))) void *test_malloc(size_t n) { return emu::device_malloc(n); }
extern "C" __attribute__((visibility("default"))) void test_free(void *memory) { emu::device_free(memory); }
"""


def need_nvcc(target: Target) -> Nvcc:
    """The compiler for ``target``; skips the test where there is none, and says so."""
    try:
        return cuda_toolchain.find(target)
    except ValueError as error:
        pytest.skip(str(error))


class EmulatedNvcc(Nvcc):
    """Makes code for the emulator, of the oldest architecture asked for."""

    def compile(self, source: str, output: Path, architectures: Sequence[str], *flags: str) -> None:
        from cuda_emulator import emulator

        emulator.emulate_source(source + _APP, output, shared=False, arch=architectures[0], flags=flags)

    def link_shared(self, output: str, objects: Sequence[str], *_flags: str, **_: Any) -> None:
        library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
        toolchain.run("g++", "g++", "-shared", "-o", output, *objects, f"-L{library}", "-ltvm_ffi")

    link_shared.object_format = "o"  # type: ignore[attr-defined]


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine one with a GPU and nvcc, both of them emulated."""
    nvcc = EmulatedNvcc(Path("emulated"), "0", ())
    monkeypatch.setattr(cuda_toolchain, "find", lambda target: nvcc)
    monkeypatch.setattr(gpu, "device", tvm.cpu)
    monkeypatch.setattr(targets, "missing_gpu", lambda architectures: "")
