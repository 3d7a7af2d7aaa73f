"""Latency of artifacts next to ONNX Runtime, in one process: checked first, then timed in turns.

Every subject is called in rounds, one after the other, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline import artifact, session
from pipeline.session import Session
from targets import cpu_name


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
    """Measurements of one run on one machine."""

    cpu: str
    threads: int
    date: str
    emulated: bool
    measurements: tuple[Measurement, ...]


def bench(
    artifacts: list[Path],
    models: list[Path],
    threads: int,
    rounds: int = 30,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Time artifacts, and ONNX files in ONNX Runtime, with ``threads`` threads each.

    Args:
        on_round: called with the rounds done and in all.

    Raises:
        ValueError: an artifact that fails its golden pair or was compiled for another number of threads.
    """
    timers: dict[str, tuple[Callable[[int], float], Measurement]] = {}
    common = {"median_us": 0.0, "p10_us": 0.0, "p90_us": 0.0, "rounds": rounds}
    for folder in artifacts:
        verdict = session.verify(folder)
        if not verdict.passed:
            raise ValueError(f"{folder}: differs from ONNX Runtime by {verdict.error:.3g}, so it is not timed")
        loaded = Session(folder)
        if loaded.manifest.threads != threads:
            raise ValueError(f"{folder}: compiled for {loaded.manifest.threads} threads, asked to time {threads}")
        timers[str(folder)] = (
            _artifact_timer(loaded, artifact.golden(folder)[0]),
            Measurement(
                name=str(folder), runtime="crossbit", target=verdict.target, error=verdict.error, **common
            ),
        )
    for path in models:
        timers[str(path)] = (
            _onnxruntime_timer(path, threads),
            Measurement(name=str(path), runtime="onnxruntime", target="cpu", **common),
        )
    # A round of a subject lasts some 5 ms, the first is a warm-up.
    calls = {name: max(1, int(0.005 / timer(3))) for name, (timer, _) in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for done in range(rounds):
        for name, (timer, _) in timers.items():
            seconds[name].append(timer(calls[name]))
        on_round(done + 1, rounds)
    return Bench(
        cpu=cpu_name(),
        threads=threads,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        emulated=False,
        measurements=tuple(_filled(subject, seconds[name]) for name, (_, subject) in timers.items()),
    )


def _filled(subject: Measurement, seconds: list[float]) -> Measurement:
    p10, median, p90 = (float(q) * 1e6 for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return subject.model_copy(update={"median_us": median, "p10_us": p10, "p90_us": p90})


def _artifact_timer(loaded: Session, inputs: dict[str, np.ndarray]) -> Callable[[int], float]:
    return lambda calls: loaded.seconds(inputs, calls)


def _onnxruntime_timer(path: Path, threads: int) -> Callable[[int], float]:
    from pipeline.packaging import oracle

    runtime = oracle(path, threads)
    rng = np.random.default_rng(0)
    shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in runtime.get_inputs()}
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    def timer(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            runtime.run(None, inputs)
        return (time.perf_counter() - start) / calls

    return timer
