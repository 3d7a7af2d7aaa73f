"""This machine's GPU as a device of TVM, whose wheel has the CUDA back end but not the libraries that it needs."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import tvm

_CUDA = "libcudart.so.13"


@cache
def device() -> Any:
    """The first GPU.

    Raises:
        ValueError: the CUDA runtime is missing, or TVM sees no GPU.
    """
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13/lib" for folder in (wheels.submodule_search_locations or [])] if wheels else []
    runtime = next((folder / _CUDA for folder in folders if (folder / _CUDA).is_file()), Path(_CUDA))
    try:
        # TVM loads its back end when it is imported, silently or not at all: it looks for the runtime on the loader's
        # path alone.
        for library in (runtime, Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ValueError(
            f"the CUDA runtime does not load ({error}): run `pip install nvidia-cuda-runtime==13.0.*`, or install "
            f"NVIDIA's CUDA 13"
        ) from error
    found = tvm.cuda(0)
    if not found.exist:
        raise ValueError(
            "TVM's CUDA runtime finds no GPU: see whether `nvidia-smi` does, and what CUDA_VISIBLE_DEVICES is"
        )
    return found
