"""The time of what is called again and again."""

from __future__ import annotations

import time
from collections.abc import Callable


def timer(call: Callable[[], object]) -> Callable[[int], float]:
    """seconds(calls): the mean time of a call, of so many in a row."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return seconds
