"""GPUs for tests: NVIDIA's compiler, where it is installed, and an emulated GPU with a compiler of its own."""

from __future__ import annotations

import re
import subprocess
import tempfile
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
# What the driver of tests calls for a kernel: sizes of grid, block and shared memory, and pointers to its arguments.
_LAUNCH = """
#include <utility>
template <class... P, size_t... I>
static int start(void (*kernel)(P...), const unsigned *n, void **p, std::index_sequence<I...>) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(n[0], n[1], n[2]), config.blockDim = dim3(n[3], n[4], n[5]), config.dynamicSmemBytes = n[6];
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n[6]);
  return status ? status : cudaLaunchKernelEx(&config, kernel, *(P *)p[I]...);
}
template <class... P> static int start(void (*kernel)(P...), const unsigned *n, void **p) {
  return start(kernel, n, p, std::index_sequence_for<P...>());
}
"""
_ENTRY = """
extern "C" __attribute__((visibility("default"))) int emulated_{0}(const unsigned *n, void **p) {{
  return start({0}, n, p);
}}
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

    def compile_kernels(self, source: str, output: Path, architecture: str) -> None:
        from cuda_emulator import emulator

        names = re.findall(r"__launch_bounds__\(\d+\) (\w+)\([^;{]*\) \{", source)
        text = source + _LAUNCH + "".join(_ENTRY.format(name) for name in names)
        with tempfile.TemporaryDirectory() as folder:
            kernels = emulator.emulate_source(text, Path(folder) / "kernels.o", shared=False, arch=architecture)
            self.link_shared(str(output), [str(kernels)])

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


def driver(folder: Path) -> dict[str, str]:
    """The environment of a process whose driver has one GPU, of compute capability 8.6, emulated."""
    source = Path(__file__).with_name("cuda_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "CUDA_EMULATOR_ANY_MEMORY": "1"}
