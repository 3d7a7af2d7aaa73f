"""Latency of artifacts next to ONNX Runtime, in one process: checked first, then timed in turns.

Every subject is called in rounds, one after the other, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

import targets
from pipeline import artifact, ceiling, gpu, session
from pipeline.remote import Board
from pipeline.session import Session
from pipeline.timer import timer

# Seconds between two subjects of several threads: workers of the one before would take its cores, for they spin
# when there is nothing to do (ONNX Runtime 1.31's for 45 ms).
_REST = 0.1
_WARM_UP = 3  # calls


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measurement(_Record):
    """One subject. Times in microseconds a call: the median and the deciles over the rounds."""

    name: str
    runtime: Literal["crossbit", "onnxruntime"]
    target: str
    median_us: float
    p10_us: float
    p90_us: float
    rounds: int
    error: float | None = None


class Bench(_Record):
    """Measurements of one run on one machine.

    Attributes:
        cpu: what ran, with the GPU before it where one did.
        emulated: times are those of an emulator, and say nothing about the CPU; None where the board does not know.
        board: where it was measured, over RPC, by the board's clock; None for this machine.
    """

    cpu: str
    threads: int
    date: str
    emulated: bool | None
    board: str | None = None
    measurements: tuple[Measurement, ...]


class KernelTime(_Record):
    """One call of a kernel: the least time of several runs, and what it did in it, see `artifact.Call`.

    Attributes:
        gmacs_per_second: billions of multiply-accumulates; None where there are none.
        of_ceiling: their share of what the cores can do; None where that is not known.
    """

    kernel: str
    us: float
    kind: str
    macs: int
    bytes: int
    gmacs_per_second: float | None
    of_ceiling: float | None


class Profile(_Record):
    """The kernels of one artifact in the order of execution.

    Attributes:
        ceilings: billions of multiply-accumulates a second by kind, of all threads: `ceiling.c` times their number.
        no_ceiling: why there are none; '' where there are.
    """

    kernels: tuple[KernelTime, ...]
    ceilings: dict[str, float]
    no_ceiling: str


def profile(folder: Path, calls: int = 10) -> Profile:
    """Time every kernel of an artifact on this machine, beside the ceiling of its cores for the target's instructions.

    Raises:
        ValueError: as `Session`, or a C library.
    """
    loaded = session.open_session(folder)
    manifest = loaded.manifest
    seconds = loaded.kernel_seconds(artifact.golden(folder)[0], calls)
    ceilings, why = _ceilings(manifest, calls)
    kernels = []
    for (name, each), call in zip(seconds.items(), manifest.calls, strict=True):
        rate = call.macs / each / 1e9 if call.macs else None
        most = ceilings.get(call.kind)
        kernels.append(
            KernelTime(
                kernel=name,
                us=each * 1e6,
                kind=call.kind,
                macs=call.macs,
                bytes=call.bytes,
                gmacs_per_second=rate,
                of_ceiling=rate / most if rate and most else None,
            )
        )
    return Profile(kernels=tuple(kernels), ceilings=ceilings, no_ceiling=why)


def _ceilings(manifest: artifact.Manifest, runs: int) -> tuple[dict[str, float], str]:
    """As of `Profile`; the best of ``runs``, as the kernels' are."""
    if manifest.gpus:
        return {}, "the ceiling of a GPU is not measured"
    try:
        loops = ceiling.loops(targets.load(manifest.target))
    except ValueError as error:  # a board may have no compiler, and its kernels be timed all the same
        return {}, str(error)
    best = {str(kind): max(loop() for _ in range(runs)) for kind, loop in loops.items()}
    return {kind: rate * manifest.threads / 1e9 for kind, rate in best.items()}, ""


def bench(
    artifacts: list[Path],
    models: list[Path],
    threads: int,
    rounds: int = 30,
    on_round: Callable[[int, int], None] = lambda done, total: None,
    board: Board | None = None,
) -> Bench:
    """Time artifacts, and ONNX files in ONNX Runtime at the first artifact's batch, with ``threads`` threads each.

    Args:
        on_round: called with the rounds done and in all.
        board: where to run the artifacts instead of here.

    Raises:
        ValueError: an artifact that fails its golden pair or was compiled for another number of threads; ONNX files
            for a board.
        OSError: the board went away.
    """
    if board is not None and models:
        raise ValueError(f"{models[0]}: ONNX Runtime runs on this machine, not on {board}; leave the ONNX files out")
    sessions = [board.open(folder) if board else session.open_session(folder) for folder in artifacts]
    subjects = [artifact_subject(loaded, threads) for loaded in sessions]
    batch = sessions[0].manifest.inputs[0].shape[0] if sessions else 1
    subjects += [onnx_subject(path, threads, batch) for path in models]
    seconds = in_turns([subject.seconds for subject in subjects], threads, rounds, on_round)
    return Bench(
        cpu=(board.cpu or "unknown CPU") if board else " and ".join([*_gpu_name(sessions), targets.cpu_name()]),
        threads=threads,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        emulated=board.emulated if board else False,
        board=str(board) if board else None,
        measurements=tuple(_measurement(s, times) for s, times in zip(subjects, seconds, strict=True)),
    )


def in_turns(
    timers: Sequence[Callable[[int], float]],
    threads: int,
    rounds: int,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Seconds of a call of each subject in each round, in which one is timed after the other, some 5 ms each.

    Args:
        timers: seconds(calls) is the mean time of a call.
        threads, on_round: as of `bench`.
    """
    calls = [max(1, int(0.005 / subject(3))) for subject in timers]  # this first call is a warm-up
    seconds: list[list[float]] = [[] for _ in timers]
    for done in range(rounds):
        for subject, count, times in zip(timers, calls, seconds, strict=True):
            if threads > 1:
                time.sleep(_REST)
            subject(_WARM_UP)
            times.append(subject(count))
        on_round(done + 1, rounds)
    return seconds


def _gpu_name(sessions: list[Session]) -> list[str]:
    return [str(gpu.device().device_name)] if any(loaded.manifest.gpus for loaded in sessions) else []


@dataclass(frozen=True)
class Subject:
    """What is timed: seconds(calls) is the mean time of a call."""

    name: str
    runtime: Literal["crossbit", "onnxruntime"]
    target: str
    error: float | None
    seconds: Callable[[int], float]


def _measurement(subject: Subject, seconds: list[float]) -> Measurement:
    p10, median, p90 = (float(q) * 1e6 for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Measurement(
        name=subject.name,
        runtime=subject.runtime,
        target=subject.target,
        median_us=median,
        p10_us=p10,
        p90_us=p90,
        rounds=len(seconds),
        error=subject.error,
    )


def artifact_subject(loaded: Session, threads: int) -> Subject:
    """An artifact, after its golden pair was checked.

    Raises:
        ValueError: it differs, or was compiled for another number of threads.
    """
    folder = loaded.folder
    verdict = session.verify(loaded)
    if not verdict.passed:
        raise ValueError(f"{folder}: differs from ONNX Runtime by {verdict.error:.3g}, so it is not timed")
    if loaded.manifest.threads != threads:
        raise ValueError(f"{folder}: compiled for {loaded.manifest.threads} threads, asked to time {threads}")
    inputs, _ = artifact.golden(folder)
    return Subject(str(folder), "crossbit", verdict.target, verdict.error, lambda calls: loaded.seconds(inputs, calls))


def onnx_subject(path: Path, threads: int, batch: int) -> Subject:
    """An ONNX file in ONNX Runtime, on random inputs.

    Raises:
        ValueError: it cannot be read.
    """
    from pipeline import onnx_file
    from pipeline.packaging import onnxruntime

    shapes = {str(v.name): onnx_file.shape(v) for v in onnx_file.read(path, batch).graph.inputs}
    runtime = onnxruntime(path, threads)
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    return Subject(str(path), "onnxruntime", "cpu", None, timer(lambda: runtime.run(None, inputs)))
