"""One block of memory for all tensors of a straight line of steps: who lies where, and how far from the best that is.

A tensor is alive from the first step that touches it to the last; two that are alive together may not overlap. Packing
them is NP-hard, but what is alive at the fullest step is a lower bound of every packing for this order of steps, and
on networks the greedy ones below mostly reach it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register of any target
_SHUFFLES = 1000


@dataclass(frozen=True)
class Span:
    """A tensor of ``size`` bytes that is alive from step ``first`` to ``last``, both included."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where every span begins.

    Attributes:
        offsets: in bytes, multiples of `ALIGNMENT`, in the order of the spans.
        size: bytes of the whole block.
        bound: the bytes below which no plan for this order of steps can go.
    """

    offsets: tuple[int, ...]
    size: int
    bound: int


def plan(spans: Sequence[Span]) -> Plan:
    """The smallest of several first-fit packings: larger first, longer-lived first, earlier first, then random swaps
    of the best (seeded), until one reaches the bound."""
    sizes = [aligned(span.size) for span in spans]
    steps = range(max((span.last for span in spans), default=-1) + 1)
    bound = max((sum(n for n, s in zip(sizes, spans, strict=True) if s.first <= i <= s.last) for i in steps), default=0)

    def lifetime(i: int) -> int:
        return spans[i].last - spans[i].first

    def packed(order: Sequence[int]) -> tuple[int, list[int]]:
        offsets = _first_fit(order, sizes, spans)
        return max((offsets[i] + sizes[i] for i in order), default=0), offsets

    indices = range(len(spans))
    orders = [
        sorted(indices, key=lambda i: (-sizes[i], spans[i].first)),
        sorted(indices, key=lambda i: (-sizes[i] * (lifetime(i) + 1), spans[i].first)),
        sorted(indices, key=lambda i: (-lifetime(i), -sizes[i])),
        sorted(indices, key=lambda i: (spans[i].first, -sizes[i])),
    ]
    order = min(orders, key=lambda o: packed(o)[0])
    size, offsets = packed(order)
    rng = random.Random(0)
    for _ in range(_SHUFFLES if len(spans) > 1 else 0):
        if size == bound:
            break
        one, other = rng.sample(indices, 2)
        swapped = list(order)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        found = packed(swapped)
        if found[0] <= size:
            order, (size, offsets) = swapped, found
    return Plan(tuple(offsets), size, bound)


def aligned(size: int) -> int:
    """``size`` rounded up to whole `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def in_turn(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where blocks of ``sizes`` bytes lie one after the other, and how many bytes all need."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += aligned(size)
    return places, end


def _first_fit(order: Sequence[int], sizes: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """The lowest free offset for one span after the other."""
    offsets = [0] * len(spans)
    placed: list[int] = []
    for i in order:
        at = 0
        for other in sorted(placed, key=lambda j: offsets[j]):
            together = spans[i].first <= spans[other].last and spans[other].first <= spans[i].last
            if together and at < offsets[other] + sizes[other]:
                if at + sizes[i] <= offsets[other]:
                    break
                at = offsets[other] + sizes[other]
        offsets[i] = at
        placed.append(i)
    return offsets
