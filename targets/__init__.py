"""The targets by name: this folder is the registry, a file without a leading underscore is a member.

A member defines ``TARGET``. The name is the file's with dashes: ``x86_avx2.py`` is ``x86-avx2``. ``host`` is the
best member that this CPU can run.
"""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module

from targets._gpu import Gpu, capability
from targets._gpu import missing as missing_gpu
from targets._target import (
    ByteCounter,
    BytePopcount,
    ByteProduct,
    ShiftInsert,
    Target,
    cores,
    cpu_features,
    cpu_name,
    cpu_part,
)

__all__ = [
    "ByteCounter",
    "BytePopcount",
    "ByteProduct",
    "Gpu",
    "ShiftInsert",
    "Target",
    "architectures",
    "capability",
    "cores",
    "cpu_features",
    "cpu_name",
    "cpu_part",
    "host",
    "load",
    "missing_gpu",
    "names",
]


def names() -> list[str]:
    """Every target of this folder."""
    modules = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in modules)


def load(name: str) -> Target:
    """The target called ``name``, or for 'host' the best one that this CPU can run.

    Raises:
        ValueError: there is no such target, or none for this CPU.
    """
    if name == "host":
        return host()
    if name not in names():
        near = difflib.get_close_matches(name, [*names(), "host"], n=3, cutoff=0.3) or [*names(), "host"]
        raise ValueError(f"there is no target '{name}': did you mean {' or '.join(near)}? See `crossbit targets`")
    target = import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    assert isinstance(target, Target) and target.name == name
    return target


def host() -> Target:
    """This core's own target, or else the one with the most features among those that this CPU can run.

    Raises:
        ValueError: no target of the folder runs on this CPU.
    """
    runnable = [t for t in map(load, names()) if t.gpu is None and not t.missing_features()]
    if not runnable:
        raise ValueError(f"no target runs on this CPU: the package has {', '.join(names())}; name one with --target")
    return max(runnable, key=lambda target: (target.cpu_part == cpu_part(), len(target.features)))


def architectures(target: Target, shared_bytes: int) -> tuple[str, ...]:
    """The GPUs beside a CPU like the target's for which its kernels are right too: the same tensor cores and copies.

    Args:
        shared_bytes: what a block of the kernels shares at most.
    """
    assert target.gpu is not None
    others = [other.gpu for other in map(load, names()) if other.machine == target.machine and other.gpu is not None]
    taking = [gpu.arch for gpu in others if gpu.takes(target.gpu, shared_bytes)]
    return tuple(sorted(taking, key=lambda arch: int(arch.removeprefix("sm_"))))
