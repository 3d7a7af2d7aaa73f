"""The most multiply-accumulates a second that one core of this machine can do, by register loops (`ceiling.c`)."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from pipeline import toolchain
from targets import Target

Kind = Literal["binary", "integer", "float"]

_MACS = 50_000_000  # of a run; below a millisecond on a core with vectors of 512 bits


def loops(target: Target) -> dict[Kind, Callable[[], float]]:
    """What measures the ceiling of each kind, with the instructions of ``target``: multiply-accumulates a second.

    Raises:
        ValueError: there is no C compiler, or the target has no vectors that the loops know.
    """
    tools = toolchain.find(target)
    source = str(Path(__file__).with_suffix(".c"))
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/ceiling.so"
        tools.run(*tools.cc, "-O3", "-shared", "-fPIC", source, "-o", library)
        loaded = ctypes.CDLL(library)  # stays when its file is gone

    def loop(kind: Kind) -> Callable[[], float]:
        function = loaded[f"{kind}_macs_per_second"]
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
        return lambda: float(function(_MACS))

    return {kind: loop(kind) for kind in get_args(Kind)}
