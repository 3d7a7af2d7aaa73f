"""The most that one core of this machine can do a second, by loops in C (`ceiling.c`): multiply-accumulate, or read."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline import toolchain
from targets import Target

Kind = Literal["binary", "integer", "float"]

_MACS = 50_000_000  # of a run; below a millisecond on a core with vectors of 512 bits


def _library(target: Target) -> ctypes.CDLL:
    tools = toolchain.find(target)
    source = str(Path(__file__).with_suffix(".c"))
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/ceiling.so"
        tools.run(*tools.cc, "-O3", "-shared", "-fPIC", source, "-o", library)
        return ctypes.CDLL(library)  # stays when its file is gone


def _rate(function: Any) -> Callable[[int], float]:
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
    return lambda amount: float(function(amount))


def loops(target: Target) -> dict[Kind, Callable[[], float]]:
    """What measures the ceiling of each kind, with the instructions of ``target``: multiply-accumulates a second.

    Raises:
        ValueError: there is no C compiler, or the target has no vectors that the loops know.
    """
    library = _library(target)
    rates = {kind: _rate(library[f"{kind}_macs_per_second"]) for kind in get_args(Kind)}
    return {kind: partial(rate, _MACS) for kind, rate in rates.items()}


def reading(target: Target) -> Callable[[int], float]:
    """What measures how many bytes a second the core reads of so many bytes, from end to end and again, as `loops`.

    Before that they are read once, so they come from the nearest cache that holds them, as what a kernel needs does.
    """
    return _rate(_library(target)["read_bytes_per_second"])
