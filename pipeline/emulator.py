"""QEMU: programs of another machine run here, with the instructions of the target's CPU and no more.

That shows whether code is right, never how fast it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from targets import Target

_QEMU = {"aarch64": "qemu-aarch64", "armv7l": "qemu-arm"}
# QEMU 7.2 has a model of most cores by their name; for the others, the smallest that has their instructions.
_STAND_INS = {"cortex-a55": "cortex-a76", "cortex-a710": "max"}
_C_LIBRARY = {"aarch64": "libc6-arm64-cross", "armv7l": "libc6-armhf-cross"}


def command(target: Target) -> list[str]:
    """What to write before a program of ``target`` and its arguments.

    Raises:
        ValueError: there is no emulator of the machine, or it is not installed.
    """
    if target.machine not in _QEMU:
        raise ValueError(f"no emulator for target {target.name}: only {' and '.join(_QEMU)} CPUs are emulated")
    qemu = _QEMU[target.machine]
    if shutil.which(qemu) is None:
        raise ValueError(f"{qemu} is missing, which emulates {target.name}: run `apt-get install qemu-user`")
    return [qemu, "-cpu", _STAND_INS.get(target.name, target.name), "-L", str(_sysroot(target))]


def check_c_library(target: Target) -> None:
    """Refuse to run programs that are not static where the C library of the other machine is not installed.

    Raises:
        ValueError: it is not; the sentence says what to install.
    """
    folder = _sysroot(target) / "lib"
    if not folder.is_dir():
        package = _C_LIBRARY[target.machine]
        raise ValueError(f"{folder} is missing, the C library of what is emulated: run `apt-get install {package}`")


def _sysroot(target: Target) -> Path:
    return Path("/usr") / target.gnu_triple  # where Debian puts the C libraries of other machines
