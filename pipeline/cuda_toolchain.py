"""NVIDIA's compiler: nvcc of the wheels that the extra `cuda` brings, or of a CUDA toolkit on this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.toolchain import run
from targets import Target

_PREFIX = "/usr/local/cuda"  # of NVIDIA's packages for Linux
_CODE = ("-std=c++17", "-O3")
_WHEELS = "run `pip install '.[cuda]'` in crossbit's folder (CUDA 13.0)"
_INSTALL = f"{_WHEELS}, or install NVIDIA's CUDA toolkit and put nvcc on PATH or its folder in CUDA_PATH"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        path: of nvcc; its tools lie beside it.
        version: '13.0.88'.
        architectures: what it makes machine code for: 'sm_80', ...
    """

    path: Path
    version: str
    architectures: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"nvcc {self.version}"

    def compile(self, source: str, output: Path, architectures: Sequence[str], *flags: str) -> None:
        """CUDA C++ to an object that holds machine code for every one of ``architectures``.

        The code is translated once, for the oldest of them, and assembled for each.

        Raises:
            ValueError: it failed.
        """
        number = min(int(arch.removeprefix("sm_")) for arch in architectures)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{output.stem}.cu"
            file.write_text(source)
            code = ("-c", *_CODE, "-Xcompiler", "-fPIC", "--threads", "0")
            generate = f"arch=compute_{number},code=[{','.join(architectures)}]"
            run(self.name, str(self.path), *code, "-gencode", generate, *flags, "-o", str(output), str(file))

    def compile_kernels(self, source: str, output: Path, architecture: str) -> None:
        """The kernels of CUDA C++ as the driver loads them: machine code, without the host's.

        Raises:
            ValueError: it failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            file, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
            file.write_text(source)
            run(self.name, str(self.path), "-cubin", f"-arch={architecture}", *_CODE, "-o", str(made), str(file))
            shutil.move(made, output)  # whole or not at all

    def link_shared(self, output: str, objects: Sequence[str], *flags: str, **_: Any) -> None:
        """As `toolchain.Toolchain.link_shared`; the CUDA runtime goes into the library."""
        libraries = [f"-L{folder}" for folder in (self.path.parents[1] / "lib",) if folder.is_dir()]
        run(self.name, str(self.path), "-shared", "-Xcompiler", "-fPIC", "-o", output, *objects, *libraries, *flags)

    link_shared.object_format = "o"  # type: ignore[attr-defined]  # what TVM reads of an fcompile

    def machine_code(self, binary: Path) -> dict[tuple[str, str], str]:
        """The SASS of every kernel of a library or object by (architecture, kernel).

        Raises:
            ValueError: there is no cuobjdump beside nvcc.
        """
        tool = self.path.with_name("cuobjdump")
        if not tool.is_file():
            raise ValueError(f"{tool}: missing; {_WHEELS} or install the whole CUDA toolkit")
        found = {}
        for listing in run("cuobjdump", str(tool), "-sass", str(binary)).split("code for ")[1:]:
            architecture = listing.split(maxsplit=1)[0]
            for kernel in re.split(r"\bFunction : ", listing)[1:]:
                found[architecture, kernel.split(maxsplit=1)[0]] = kernel
        return found


def find(target: Target) -> Nvcc:
    """The first nvcc that knows the target's GPU: of the wheels, of CUDA_PATH, of /usr/local/cuda, on PATH.

    Raises:
        ValueError: there is none, no host compiler, or the target's CPU is another machine's; the sentence says what
            to do.
    """
    assert target.gpu is not None
    if target.machine != platform.machine():
        raise ValueError(
            f"target {target.name} has {target.machine} beside its GPU, and nvcc links for {platform.machine()}, this "
            f"machine: compile there"
        )
    found = [_read(path) for path in dict.fromkeys(_installed())]
    for nvcc in found:
        if target.gpu.arch in nvcc.architectures:
            if not shutil.which("g++"):
                raise ValueError("nvcc compiles with g++, and there is none: run `apt-get install g++`")
            return nvcc
    known = "; ".join(f"{nvcc.name} ({nvcc.path}) knows {', '.join(nvcc.architectures)}" for nvcc in found)
    raise ValueError(f"no nvcc for {target.gpu.arch} on this machine{known and f' ({known})'}: {_INSTALL}")


def _installed() -> Iterator[Path]:
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" for folder in (wheels.submodule_search_locations or [])] if wheels else []
    folders += [Path(folder) for folder in (os.environ.get("CUDA_PATH"), _PREFIX) if folder]
    on_path = shutil.which("nvcc")
    for nvcc in [*(folder / "bin" / "nvcc" for folder in folders), *([Path(on_path)] if on_path else [])]:
        if nvcc.is_file():
            yield nvcc


@cache
def _read(path: Path) -> Nvcc:
    version = re.search(r"\bV([\d.]+)", run("nvcc", str(path), "--version"))
    architectures = re.findall(r"sm_\d+", run("nvcc", str(path), "--list-gpu-code"))
    return Nvcc(path, version[1] if version else "", tuple(architectures))
