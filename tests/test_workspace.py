"""Plans of one block of memory: nothing overlaps, and small cases are as good as brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.workspace import ALIGNMENT, Plan, Span, aligned, in_turn, plan

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([1, 63, 64, 65, 4096, 100_000]))


@st.composite
def lines(draw: st.DrawFn, most: int = 25, sizes: st.SearchStrategy[int] = SIZES) -> list[Span]:
    """Spans over a few steps, so that many meet."""
    steps = draw(st.integers(1, 12))
    pairs = st.tuples(st.integers(0, steps - 1), st.integers(0, steps - 1)).map(sorted)
    return [Span(size, *pair) for size, pair in draw(st.lists(st.tuples(sizes, pairs), max_size=most))]


def fullest_step(spans: list[Span]) -> int:
    return max(
        (sum(aligned(s.size) for s in spans if s.first <= step <= s.last) for step in {s.first for s in spans}),
        default=0,
    )


def assert_valid(spans: list[Span], made: Plan) -> None:
    """Byte by byte in units of the alignment: each is one span's at every step."""
    assert len(made.offsets) == len(spans)
    ends = [offset + aligned(span.size) for span, offset in zip(spans, made.offsets, strict=True)]
    assert made.size == max(ends, default=0)
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in made.offsets)
    owners: dict[tuple[int, int], int] = {}
    for i, (span, offset) in enumerate(zip(spans, made.offsets, strict=True)):
        for step in range(span.first, span.last + 1):
            for block in range(offset // ALIGNMENT, -(-(offset + span.size) // ALIGNMENT)):
                assert owners.setdefault((step, block), i) == i


@given(lines(sizes=st.one_of(st.integers(1, 300), st.sampled_from([1, 63, 64, 65, 4096]))))
def test_live_spans_never_overlap(spans: list[Span]) -> None:
    made = plan(spans)
    assert_valid(spans, made)
    assert made.bound == fullest_step(spans) <= made.size <= sum(aligned(s.size) for s in spans)


@given(lines())
def test_the_same_spans_get_the_same_plan(spans: list[Span]) -> None:
    assert plan(spans) == plan(spans)


def best(spans: list[Span]) -> int:
    """The smallest packing: in some order, dropping every span as deep as it goes makes it."""
    smallest = sum(aligned(s.size) for s in spans)
    for order in permutations(spans):
        placed: list[tuple[Span, int]] = []
        for span in order:
            below = [at + aligned(s.size) for s, at in placed if s.first <= span.last and span.first <= s.last]
            placed.append((span, max(below, default=0)))  # it rests on these
        smallest = min(smallest, max(at + aligned(s.size) for s, at in placed))
    return smallest


@given(lines(most=6, sizes=st.integers(1, 6).map(lambda n: n * ALIGNMENT)))
def test_few_spans_are_packed_as_brute_force_packs_them(spans: list[Span]) -> None:
    made = plan(spans)
    optimum = best(spans) if spans else 0
    assert made.bound <= optimum == made.size


def chain(rng: np.random.Generator, layers: int) -> list[Span]:
    """A tensor between every two layers, and the temporaries of some."""
    sizes = rng.integers(1, 200_000, layers)
    spans = [Span(int(size), i, i + 1) for i, size in enumerate(sizes)]
    return spans + [Span(int(rng.integers(1, 50_000)), i, i) for i in range(layers) if rng.random() < 0.3]


def residual(rng: np.random.Generator, blocks: int) -> list[Span]:
    """Blocks of two layers with a shortcut: shrinking images, so that the next is half of the last every few blocks."""
    spans, size, step = [Span(131072, 0, 2)], 131072, 0
    for block in range(blocks):
        if block % 3 == 2:
            size = max(size // 2, 4096)
        spans += [Span(size // 32, step, step + 1), Span(size, step + 1, step + 2), Span(size, step + 2, step + 4)]
        spans.append(Span(int(rng.integers(64, size // 4)), step + 1, step + 1))
        step += 2
    return spans


@pytest.mark.parametrize("shape", [chain, residual])
@pytest.mark.parametrize("length", [1, 2, 5, 20, 60])
def test_networks_are_within_a_tenth_of_the_bound(shape: object, length: int, rng: np.random.Generator) -> None:
    spans = shape(rng, length)  # type: ignore[operator]
    made = plan(spans)
    assert_valid(spans, made)
    assert made.size <= 1.1 * made.bound, (made.size, made.bound, spans)


@given(st.lists(st.integers(1, 300) | st.sampled_from([63, 64, 65, 4096]), max_size=25))
def test_blocks_in_turn_lie_without_gaps(sizes: list[int]) -> None:
    places, end = in_turn(sizes)
    assert places == sorted(places)
    assert_valid([Span(size, 0, 0) for size in sizes], Plan(tuple(places), end, end))
    assert end == fullest_step([Span(size, 0, 0) for size in sizes])


def test_nothing_needs_nothing() -> None:
    assert plan([]) == Plan((), 0, 0)
    assert in_turn([]) == ([], 0)
    assert plan([Span(1, 3, 3)]) == Plan((0,), ALIGNMENT, ALIGNMENT)
