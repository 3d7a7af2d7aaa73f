"""An artifact, loaded and running on this machine."""

from __future__ import annotations

import functools
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import tvm

import targets
from pipeline import artifact, gpu
from targets import cpu_features

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Session")

ALL_CORES = 1  # of the affinity modes of TVM's thread pool; see pipeline/__init__.py for the pool's size


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Refuse a second thread while one is in a session; give TVM's thread pool the artifact's size."""

    @functools.wraps(method)
    def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"{self.folder}: this session is running in another thread; open one session a thread")
        try:
            if self.manifest.threads > 1:
                # The pool belongs to the calling thread, and has the size that the last session there gave it. Code
                # for one thread never asks for it, and without it no workers are started.
                self._configure(ALL_CORES, self.manifest.threads)
            return method(self, *args, **kwargs)
        finally:
            self._lock.release()

    return guarded


class Session:
    """A loaded artifact. One session is for one thread at a time: TVM's virtual machine is not re-entrant.

    Sessions of one artifact in several threads share the library's code and constants, and run at the same time.
    Inputs are copied, so they may lie anywhere in memory and have any strides.

    Args:
        manifest: of the folder, if it has been read.

    Raises:
        ValueError: no intact artifact, or this machine cannot run it.
        RuntimeError: a method called while another thread is in one.
    """

    def __init__(self, folder: Path, manifest: artifact.Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or artifact.read(folder)
        self._lock = threading.Lock()
        self._load()

    def _check_machine(self) -> None:
        if platform.machine() != self.manifest.machine:
            raise ValueError(
                f"{self.folder}: compiled for {self.manifest.machine}, this is {platform.machine()}; "
                f"compile with a --target of this machine"
            )
        if missing := sorted(set(self.manifest.features) - cpu_features()):
            raise ValueError(
                f"{self.folder}: compiled for {self.manifest.target}, and this CPU lacks {', '.join(missing)}; "
                f"compile with --target host on this machine"
            )
        if self.manifest.gpus and (lacking := targets.missing_gpu(self.manifest.gpus)):
            found = targets.capability()
            here = f"its GPU has {found[0]}.{found[1]}" if found else "no NVIDIA driver answers"
            raise ValueError(
                f"{self.folder}: compiled for {self.manifest.target}, and this machine lacks {lacking} ({here}); "
                f"run it there, or compile with a --target of this machine"
            )

    def _load(self) -> None:
        self._check_machine()
        self._device = gpu.device() if self.manifest.gpus else tvm.cpu()
        self._configure = tvm.get_global_func("runtime.config_threadpool")
        library = tvm.runtime.load_module(str(self.folder / artifact.LIBRARY))
        self._machine = tvm.runtime.vm.VirtualMachine(library, self._device)

    @functools.cached_property
    def _inputs(self) -> list[tvm.runtime.Tensor]:
        """Where inputs are copied: TVM's allocator aligns memory to the 64 bytes that compiled code takes for granted.
        It is kept, for the pages of new memory cost more than the copy."""
        return [tvm.runtime.empty(spec.shape, spec.dtype, self._device) for spec in self.manifest.inputs]

    def _tensors(self, inputs: dict[str, np.ndarray]) -> list[tvm.runtime.Tensor]:
        expected = {spec.name: spec for spec in self.manifest.inputs}
        if set(inputs) != set(expected):
            raise ValueError(f"the inputs are {sorted(expected)}, given {sorted(inputs)}")
        for name, array in inputs.items():
            spec = expected[name]
            if array.shape != spec.shape or str(array.dtype) != spec.dtype:
                raise ValueError(
                    f"input '{name}' is {spec.dtype} {list(spec.shape)}, given {array.dtype} {list(array.shape)}"
                )
        for spec, tensor in zip(self.manifest.inputs, self._inputs, strict=True):
            if self._is_here:
                np.copyto(np.from_dlpack(tensor), inputs[spec.name])
            else:
                tensor.copyfrom(np.ascontiguousarray(inputs[spec.name]))
        return self._inputs

    @functools.cached_property
    def _is_here(self) -> bool:
        """Whether tensors lie in this process's memory, where NumPy copies twice as fast as TVM."""
        return bool(self._device == tvm.cpu())

    def _call(self, tensors: list[tvm.runtime.Tensor]) -> Any:
        """One tensor, or a sequence of them."""
        return self._machine["main"](*tensors)

    @exclusive
    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name for float32 inputs by name.

        Raises:
            ValueError: a wrong name, shape or dtype.
        """
        result = self._call(self._tensors(inputs))
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        arrays = [np.from_dlpack(r).copy() if self._is_here else r.numpy() for r in results]
        return {spec.name: array for spec, array in zip(self.manifest.outputs, arrays, strict=True)}

    @exclusive
    def seconds(self, inputs: dict[str, np.ndarray], calls: int) -> float:
        """Seconds of one call, the mean of ``calls`` in a row; the copy of the inputs is not timed."""
        tensors = self._tensors(inputs)
        function = self._machine["main"]
        self._device.sync()  # a GPU works behind the caller's back
        start = time.perf_counter()
        for _ in range(calls):
            function(*tensors)
        self._device.sync()
        return (time.perf_counter() - start) / calls

    @exclusive
    def kernel_seconds(self, inputs: dict[str, np.ndarray], calls: int) -> dict[str, float]:
        """Seconds of every kernel of one call, the least of ``calls`` runs, in the order of execution."""
        runs: list[list[tuple[str, float]]] = []
        started = 0.0

        def watch(_function: object, name: str, before: bool, _result: object, *_arguments: object) -> int:
            nonlocal started
            self._device.sync()
            if before:
                started = time.perf_counter()
            elif not name.startswith("vm.builtin"):
                runs[-1].append((name, time.perf_counter() - started))
            return 0

        self._machine.set_instrument(watch)
        tensors = self._tensors(inputs)
        for _ in range(calls):
            runs.append([])
            self._machine["main"](*tensors)
        self._machine.set_instrument(lambda *_: 0)
        least = [min(run[i][1] for run in runs) for i in range(len(runs[0]))]
        return {f"{i:02d} {runs[0][i][0]}": seconds for i, seconds in enumerate(least)}


def open_session(folder: Path) -> Session:
    """A session of an artifact of any kind.

    Raises:
        ValueError: as `Session`.
    """
    from pipeline.library_session import LibrarySession

    manifest = artifact.read(folder)
    return (Session if manifest.emit == "vm" else LibrarySession)(folder, manifest)


@dataclass(frozen=True)
class Verdict:
    """How an artifact does on its golden pair. error: the largest absolute difference, in units of the output."""

    target: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def verify(source: Path | Session) -> Verdict:
    """Run the golden input of an artifact, or of the one that a session has open; compare with ONNX Runtime's output.

    Raises:
        ValueError: as `Session`.
    """
    session = open_session(source) if isinstance(source, Path) else source
    inputs, expected = artifact.golden(session.folder)
    outputs = session.run(inputs)
    error = max(float(np.max(np.abs(outputs[name] - expected[name]), initial=0.0)) for name in expected)
    size = max(float(np.max(np.abs(value), initial=0.0)) for value in expected.values())
    error = float("inf") if np.isnan(error) else error
    return Verdict(session.manifest.target, error, session.manifest.tolerance * max(1.0, size))
