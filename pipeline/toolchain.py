"""The compilers and linkers of a target: the machine's own, GNU cross tools, or zig from the `ziglang` wheel."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from targets import Target

# What a linker without a C library may leave open: whoever loads a shared library has these.
_EVERYWHERE = frozenset({"memcpy", "memmove", "memset", "__aeabi_unwind_cpp_pr0"})


@dataclass(frozen=True)
class Toolchain:
    """Commands that make code for one target.

    Attributes:
        name: with the version, for messages and manifests: 'aarch64-linux-gnu-gcc 12.2.0'.
        cc: the C compiler, which also links, with the flags of the target's CPU.
        ar: the archiver.
        cxx: the C++ compiler, for any CPU of the target's machine; empty where it is not installed.
    """

    name: str
    cc: tuple[str, ...]
    ar: tuple[str, ...]
    cxx: tuple[str, ...] = ()

    def run(self, *command: str) -> None:
        """Run a command of this toolchain.

        Raises:
            ValueError: it failed; the sentence ends with the first lines it says about an error.
        """
        run(self.name, *command)

    def link_shared(self, output: str, objects: Sequence[str], **_: Any) -> None:
        """Link objects to a shared library: TVM's ``fcompile``."""
        self.run(*self.cc, "-shared", "-fPIC", "-o", output, *objects, "-lm")

    link_shared.object_format = "o"  # type: ignore[attr-defined]  # what TVM reads of an fcompile


@dataclass(frozen=True)
class Linker:
    """GNU binutils without a compiler: enough for objects that call nothing of the C library's but `_EVERYWHERE`."""

    triple: str

    def link_shared(self, output: str, objects: Sequence[str], **_: Any) -> None:
        """As `Toolchain.link_shared`.

        Raises:
            ValueError: it failed, or the objects need a C library.
        """
        linker = f"{self.triple}-ld"
        run(linker, linker, "-shared", "-o", output, *objects)
        symbols = run(linker, f"{self.triple}-nm", "-D", "--undefined-only", "--format=posix", output)
        names = (line.split("@")[0].split()[0] for line in symbols.splitlines() if line.split()[1] == "U")
        if missing := sorted(name for name in names if not name.startswith("TVM") and name not in _EVERYWHERE):
            raise ValueError(
                f"{linker} alone has no C library, and the code calls {', '.join(missing)}: run "
                f"`apt-get install gcc-{self.triple}` or `pip install ziglang`"
            )

    link_shared.object_format = "o"  # type: ignore[attr-defined]


def find(target: Target) -> Toolchain:
    """The first of: this machine's gcc or clang if the target is of its kind, the GNU cross compiler, zig.

    Raises:
        ValueError: there is none; the sentence says what to install.
    """
    for tools in _installed(target):
        return tools
    raise _missing("C compiler", target, "gcc", "gcc libc6-dev")


def find_cxx(target: Target) -> Toolchain:
    """As `find`, the first with a C++ compiler."""
    for tools in _installed(target):
        if tools.cxx:
            return tools
    raise _missing("C++ compiler", target, "g++", "g++")


def find_linker(target: Target) -> Toolchain | Linker:
    """As `find`, and if there is no compiler, GNU binutils' linker alone; zig has its own, ld.lld."""
    for tools in _installed(target):
        return tools
    if target.gnu_triple and shutil.which(f"{target.gnu_triple}-ld") and shutil.which(f"{target.gnu_triple}-nm"):
        return Linker(target.gnu_triple)
    raise _missing("linker", target, "binutils", "gcc libc6-dev")


def _installed(target: Target) -> Iterator[Toolchain]:
    """What this machine has for ``target``, the first choice first."""
    for compiler in ("gcc", "clang") if _native(target) else ():
        if shutil.which(compiler):
            yield _gnu(compiler, target, "ar", {"gcc": "g++", "clang": "clang++"}[compiler])
    if target.gnu_triple and shutil.which(f"{target.gnu_triple}-gcc"):
        yield _gnu(f"{target.gnu_triple}-gcc", target, f"{target.gnu_triple}-ar", f"{target.gnu_triple}-g++")
    if target.zig_triple and importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        cc = (*zig, "cc", "-target", target.zig_triple, f"-mcpu={zig_cpu(target)}")
        # The oldest glibc that boards still have: what zig links runs with it and any newer one.
        cxx = (*zig, "c++", "-target", f"{target.zig_triple}.2.28") if target.tvm_runtime else ()
        yield Toolchain(f"zig {_first_line(*zig, 'version')}", cc, (*zig, "ar"), cxx)


def _gnu(compiler: str, target: Target, ar: str, cxx: str) -> Toolchain:
    version = _first_line(compiler, "-dumpfullversion" if compiler.endswith("gcc") else "-dumpversion")
    return Toolchain(f"{compiler} {version}", (compiler, *target.cflags), (ar,), (cxx,) if shutil.which(cxx) else ())


def _native(target: Target) -> bool:
    return target.machine == platform.machine()


def _missing(what: str, target: Target, cross_package: str, native_packages: str) -> ValueError:
    ways = [f"apt-get install {native_packages}"] if _native(target) else []
    if target.gnu_triple and not _native(target):
        ways.append(f"apt-get install {cross_package}-{target.gnu_triple}")
    if target.zig_triple:
        ways.append("pip install ziglang")
    return ValueError(f"no {what} for target {target.name} on this machine: run `{'` or `'.join(ways)}`")


def zig_cpu(target: Target) -> str:
    """The CPU and its attributes as zig writes them: LLVM's names with underscores."""
    cpu = target.cpu.replace("-", "_")
    return cpu + "".join(a[0] + a[1:].replace("-", "_") for a in target.attributes)


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[0].strip()


def run(name: str, *command: str) -> str:
    """What a command prints.

    Raises:
        ValueError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower() or "undefined" in line] or said
        raise ValueError(f"{name} failed ({done.returncode}): {'; '.join(errors[:3]) or 'it says nothing'}")
    return done.stdout
