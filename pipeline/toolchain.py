"""The C compiler of a target: the machine's own, Debian's cross compiler, or zig from the `ziglang` wheel."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from targets import Target


@dataclass(frozen=True)
class Toolchain:
    """Commands that make code for one target.

    Attributes:
        name: with the version, for messages and manifests: 'aarch64-linux-gnu-gcc 12.2.0'.
        cc: the C compiler, which also links, with the flags of the target's CPU.
        ar: the archiver.
    """

    name: str
    cc: tuple[str, ...]
    ar: tuple[str, ...]

    def run(self, *command: str) -> None:
        """Run a command of this toolchain.

        Raises:
            ValueError: it failed; the sentence ends with the first lines it says about an error.
        """
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            errors = [line for line in said if "error" in line.lower() or "undefined" in line] or said
            raise ValueError(f"{self.name} failed ({done.returncode}): {'; '.join(errors[:3]) or 'it says nothing'}")

    def link_shared(self, output: str, objects: Sequence[str], **_: Any) -> None:
        """Link objects to a shared library: TVM's ``fcompile``."""
        self.run(*self.cc, "-shared", "-fPIC", "-o", output, *objects, "-lm")

    link_shared.object_format = "o"  # type: ignore[attr-defined]  # what TVM reads of an fcompile


def find(target: Target) -> Toolchain:
    """The first of: this machine's gcc or clang if the target is of its kind, the GNU cross compiler, zig.

    Raises:
        ValueError: there is none; the sentence says what to install.
    """
    native = ("gcc", "clang") if target.machine == platform.machine() else ()
    cross = (f"{target.gnu_triple}-gcc",) if target.gnu_triple else ()
    for compiler in (*native, *cross):
        if shutil.which(compiler):
            ar = f"{target.gnu_triple}-ar" if compiler in cross else "ar"
            version = _first_line(compiler, "-dumpfullversion" if compiler.endswith("gcc") else "-dumpversion")
            return Toolchain(f"{compiler} {version}", (compiler, *target.cflags), (ar,))
    if target.zig_triple and importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        cc = (*zig, "cc", "-target", target.zig_triple, f"-mcpu={zig_cpu(target)}")
        return Toolchain(f"zig {_first_line(*zig, 'version')}", cc, (*zig, "ar"))
    ways = ["apt-get install gcc libc6-dev"] if native else []
    if cross and not native:
        ways.append(f"apt-get install gcc-{target.gnu_triple}")
    if target.zig_triple:
        ways.append("pip install ziglang")
    raise ValueError(f"no C compiler for target {target.name} on this machine: run `{'` or `'.join(ways)}`")


def zig_cpu(target: Target) -> str:
    """The CPU and its attributes as zig writes them: LLVM's names with underscores."""
    cpu = target.cpu.replace("-", "_")
    return cpu + "".join(a[0] + a[1:].replace("-", "_") for a in target.attributes)


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[0].strip()
