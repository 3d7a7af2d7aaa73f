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
        ValueError: there is no emulator, or it is not installed, or a C library for programs that are not static.
    """
    if target.machine not in _QEMU:
        raise ValueError(f"no emulator for {target.machine} CPUs; those for {' and '.join(_QEMU)} are known")
    qemu = _QEMU[target.machine]
    sysroot = Path("/usr") / target.gnu_triple  # where Debian puts the C libraries of other machines
    missing = [] if shutil.which(qemu) else ["qemu-user"]
    if not (sysroot / "lib").is_dir():
        missing.append(_C_LIBRARY[target.machine])
    if missing:
        raise ValueError(
            f"target {target.name} cannot be emulated: {qemu} or a C library for it is missing; run "
            f"`apt-get install {' '.join(missing)}`"
        )
    return [qemu, "-cpu", _STAND_INS.get(target.name, target.name), "-L", str(sysroot)]
