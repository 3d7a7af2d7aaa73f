"""Times kernels on a GPU: `run.py` of a batch that `crossbit tune` wrote (pipeline/cuda_batch.py).

    python run.py     # in a folder with manifest.json and *.cubin; needs NVIDIA's driver and NumPy, and no crossbit

Every candidate's output is compared with that of its kernel's default schedule, then it is timed by the GPU's events,
in graphs of launches. Results are lines of results.jsonl, written as they come; an interrupted run goes on from them.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST, RESULTS = "manifest.json", "results.jsonl"
_FAILED = 3  # exit code of a process whose GPU context a kernel has ended
_LIMIT = 60.0  # seconds that what is on the GPU may take
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_ROUND, _ROUNDS, _WARM = 0.001, 10, 0.5  # seconds of a round, rounds of a candidate, seconds until clocks are up


class Driver:
    """The first GPU, a stream and events, by the driver's library. Its functions raise RuntimeError where they fail.

    Attributes:
        name: 'NVIDIA H100 PCIe'.
        capability: (9, 0).
        processors: how many multiprocessors.

    Raises:
        ValueError: there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self("cuInit", 0)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"no NVIDIA GPU answers here ({error})") from error
        device, context, number = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), 0)
        numbers = []
        for attribute in (75, 76, 16):  # compute capability: major, minor; multiprocessors
            self("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        self.capability, self.processors = (numbers[0], numbers[1]), numbers[2]
        name = ctypes.create_string_buffer(100)
        self("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one of the CUDA runtime and of torch
        self("cuCtxSetCurrent", context)
        self.stream, self._start, self._stop = (ctypes.c_void_p() for _ in range(3))
        self("cuStreamCreate", ctypes.byref(self.stream), 1)
        for event in (self._start, self._stop):
            self("cuEventCreate", ctypes.byref(event), 0)

    def __call__(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} returns {status}")

    def upload(self, array: np.ndarray) -> int:
        pointer = self.allocate(array.nbytes)
        self.fill(pointer, array)
        return pointer

    def fill(self, pointer: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        data, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), data, size)
        self.wait()  # it returns before the memory of the GPU is written, and no stream of ours waits for that

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer: int) -> None:
        self("cuMemFree_v2", ctypes.c_uint64(pointer))

    def download(self, pointer: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        array = np.empty(shape, dtype)
        data, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self("cuMemcpyDtoH_v2", data, ctypes.c_uint64(pointer), size)
        return array

    def wait(self) -> None:
        self("cuCtxSynchronize")

    def seconds(self, call: Callable[[], object], calls: int, stream: ctypes.c_void_p | None = None) -> float:
        """Of one call, the mean of ``calls`` in a row on a stream, by events on the GPU."""
        stream = stream or self.stream
        self("cuEventRecord", self._start, stream)
        for _ in range(calls):
            call()
        self("cuEventRecord", self._stop, stream)
        end = time.monotonic() + _LIMIT
        while (status := self._library.cuEventQuery(self._stop)) == _NOT_READY:
            if time.monotonic() > end:
                raise RuntimeError(f"it ran more than {_LIMIT:g} s")
        if status:
            raise RuntimeError(f"the GPU stopped with error {status}")
        milliseconds = ctypes.c_float()
        self("cuEventElapsedTime", ctypes.byref(milliseconds), self._start, self._stop)
        return milliseconds.value / 1000 / calls

    def graph(self, call: Callable[[], object]) -> Callable[[], None]:
        """What ``call`` puts on the stream, as a graph that is launched at once."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuStreamBeginCapture_v2", self.stream, 0)
        call()
        self("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        return lambda: self("cuGraphLaunch", ready, self.stream)

    def kernel(self, file: Path, launch: dict[str, Any], tensors: Sequence[int]) -> Callable[[], None]:
        """A launch of a kernel of a file of machine code, on memory of the GPU.

        Args:
            launch: the fields of `pipeline.cuda_kernel.Launch`.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoad", ctypes.byref(module), str(file.resolve()).encode())
        self("cuModuleGetFunction", ctypes.byref(function), module, launch["kernel"].encode())
        self("cuFuncSetAttribute", function, 8, launch["shared_bytes"])  # the most that it may be given
        values = [ctypes.c_uint64(tensors[i]) for i in launch["pointers"]]
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = (*launch["grid"], *launch["block"], launch["shared_bytes"])

        def call(kept: Any = values) -> None:  # parameters point to the values
            self("cuLaunchKernel", function, *sizes, self.stream, parameters, None)

        return call


class _Kernel:
    """A kernel's inputs, drawn at random, and what its default schedule makes of them.

    Args:
        kernel: an entry of the manifest.
    """

    def __init__(self, driver: Driver, folder: Path, kernel: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        *inputs, output = kernel["tensors"]
        self.driver, self.folder = driver, folder
        size = int(np.prod(output[1])) * np.dtype(output[0]).itemsize
        self.nothing = np.full(size, 0xA5, np.uint8)
        self.memory = [driver.upload(_drawn(rng, *tensor)) for tensor in inputs] + [driver.allocate(size)]
        self.default = self._call(kernel["default"])
        self.expected = self._result(self.default)

    def close(self) -> None:
        for pointer in self.memory:
            self.driver.free(pointer)

    def _call(self, candidate: dict[str, Any]) -> Callable[[], None]:
        return self.driver.kernel(self.folder / f"{candidate['digest']}.cubin", candidate["launch"], self.memory)

    def _result(self, call: Callable[[], None]) -> np.ndarray:
        self.driver.fill(self.memory[-1], self.nothing)
        self.driver.seconds(call, 1)  # and waits
        return self.driver.download(self.memory[-1], self.nothing.shape, "uint8")

    def seconds(self, candidate: dict[str, Any]) -> list[float]:
        """Of a launch, for every round.

        Raises:
            ValueError: its output is another than the default schedule's.
        """
        call = self._call(candidate)
        if differing := int(np.count_nonzero(self._result(call) != self.expected)):
            raise ValueError(f"{differing} of {self.nothing.size} bytes differ from what the default schedule writes")
        count = max(1, min(100, int(_ROUND / max(self.driver.seconds(call, 3), 1e-7))))
        replay = self.driver.graph(lambda: [call() for _ in range(count)])
        self.driver.seconds(replay, 3)
        return [self.driver.seconds(replay, 1) / count for _ in range(_ROUNDS)]


def _drawn(rng: np.random.Generator, dtype: str, shape: list[int]) -> np.ndarray:
    """Floats are small whole numbers, so that every order of a sum gives the same; bytes index banks of any size."""
    if dtype == "uint32":
        return rng.integers(0, 1 << 32, shape, dtype)
    return np.zeros(shape, dtype) if dtype == "uint8" else rng.integers(-8, 9, shape).astype(dtype)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """By the digests of candidates: {"seconds": [...]} or {"error": "..."}."""
    file = folder / RESULTS
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return {line.pop("digest"): line for line in lines}


def store(folder: Path, digest: str, **result: Any) -> None:
    """Add a result to those of a batch."""
    with (folder / RESULTS).open("a") as file:
        file.write(json.dumps({"digest": digest, **result}) + "\n")


def _measure(folder: Path) -> None:
    """Measure what has no result yet, and end the process where a candidate spoils the GPU's context."""
    manifest, known = json.loads((folder / MANIFEST).read_text()), results(folder)
    driver, warm = Driver(), False
    if (arch := "sm_{}{}".format(*driver.capability)) != manifest["arch"]:
        raise ValueError(f"these candidates are for {manifest['arch']}, and this GPU, {driver.name}, is {arch}")
    for each in manifest["kernels"]:
        left = [candidate for candidate in each["candidates"] if candidate["digest"] not in known]
        if not left:
            continue
        try:
            kernel = _Kernel(driver, folder, each)
        except RuntimeError as error:
            raise ValueError(f"{each['name']}: its default schedule failed: {error}") from error
        start = time.monotonic()
        while not warm and time.monotonic() - start < _WARM:
            driver.seconds(kernel.default, 1)
        warm = True
        for candidate in left:
            try:
                seconds = kernel.seconds(candidate)
            except (ValueError, RuntimeError) as error:
                store(folder, candidate["digest"], error=str(error))
                print(f"{each['name']}: failed: {error}", flush=True)
                if isinstance(error, RuntimeError):
                    os._exit(_FAILED)  # the driver's farewell may wait for a kernel that never ends
                continue
            store(folder, candidate["digest"], seconds=seconds, gpu=driver.name)
            print(f"{each['name']}: {float(np.mean(seconds)) * 1e6:.2f} us", flush=True)
        kernel.close()


def main(arguments: list[str]) -> int:
    """Measure in a process of its own, and in another where that one's context was ended. Returns the exit code."""
    if arguments == ["--once"]:
        try:
            _measure(Path(__file__).parent)
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    command = [sys.executable, __file__, "--once"]
    while (code := subprocess.run(command, check=False).returncode) == _FAILED:
        pass
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # what was measured is kept
