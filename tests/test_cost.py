"""The cost model against every number that survived in the papers."""

from __future__ import annotations

import pytest

from pipeline import cost


@pytest.mark.parametrize(("word", "group", "expected"), [(64, 1, 17.46), (512, 1, 139.70), (512, 16, 8.73)])
def test_boundary(word: int, group: int, expected: float) -> None:
    assert round(cost.boundary(word, group), 2) == expected


@pytest.mark.parametrize(
    ("kernel", "word", "group", "expected"),
    [
        *((3, 64, m, s) for m, s in {1: 116.08, 2: 119.08, 4: 120.64, 8: 121.43, 16: 121.84}.items()),
        *((3, 512, m, s) for m, s in {1: 686.53, 2: 806.72, 4: 884.11, 8: 928.65, 16: 952.65}.items()),
        *((1, 64, m, s) for m, s in {1: 82.73, 2: 98.68, 4: 109.20, 8: 115.35, 16: 118.70}.items()),
        *((1, 512, m, s) for m, s in {1: 202.89, 2: 336.05, 4: 500.21, 8: 661.87, 16: 789.44}.items()),
    ],
)
def test_speedup(kernel: int, word: int, group: int, expected: float) -> None:
    assert round(cost.speedup(256, kernel, word, group), 2) == expected


def test_xnor_net_eq_11() -> None:
    assert round(cost.speedup(256, 3, 64, gamma=1), 2) == 62.27


def test_the_boundary_is_where_both_networks_cost_the_same() -> None:
    word, group = 512, 16
    c = cost.boundary(word, group)
    one, two = (taps * c * c / word + layers * cost.GAMMA * c / group for taps, layers in ((25, 1), (18, 2)))
    assert one == pytest.approx(two)


@pytest.mark.parametrize(
    ("kernel", "group", "expected"), [(3, 1, 31.56), (3, 16, 31.97), (1, 1, 28.44), (1, 16, 31.75)]
)
def test_memory_ratio(kernel: int, group: int, expected: float) -> None:
    assert round(cost.memory_ratio(256, kernel, group), 2) == expected


def test_table_2() -> None:
    rows = {row.method: row for row in cost.table(256, 3, 64, 16)}
    expected = {
        "TBN": 40.04,
        "HORQ, order 2": 29.02,
        "DoReFa 2w2a": 15.18,
        "XNOR-Net": 58.04,
        "XNOR-CF16": 60.92,
        "BNN, BinaryNet": 61.12,
        "BWN": 2.0,
        "full precision": 1.0,
    }
    assert {method: round(rows[method].speedup, 2) for method in expected} == expected
    assert (rows["XNOR-CF16"].macs, rows["XNOR-CF16"].binary_operations) == (2 / 16, 2)
    assert (rows["DoReFa 2w2a"].macs, rows["DoReFa 2w2a"].binary_operations) == (1, 8)
    assert (rows["BWN"].macs, rows["BWN"].additions) == (0, 2304)
    assert {row.method for row in rows.values() if not row.computed} == {"TTQ", "TWN", "BWN", "BC", "BW-CF16"}


def test_table_2_with_other_orders_and_bits() -> None:
    horq = [cost.table(256, 3, order=k)[9].speedup for k in (1, 2, 3, 4)]
    assert [round(s) for s in horq] == [58, 29, 19, 15]  # the summaries print 58, ~30, ~20, ~15
    one_bit = cost.table(256, 3, weight_bits=1, activation_bits=1)[10]
    assert (one_bit.method, round(one_bit.speedup, 1)) == ("DoReFa 1w1a", 59.5)


def test_table_2_counts_twice_what_eq_17_counts() -> None:
    for group in (1, 2, 16):
        row = cost.table(192, 1, 512, group)[8]
        assert row.speedup == pytest.approx(cost.speedup(192, 1, 512, group) / 2)


def test_sharing_saves_no_multiplication_of_an_output() -> None:
    n, m = 32, 196
    assert cost.multiplications(n, m, 1) == cost.multiplications(n, m, 16) == n * m
    assert cost.multiplications(n, m, 1, input_scale=True) == 2 * n * m
    assert cost.multiplications(n, m, 16, input_scale=True) == n * m + n * m // 16
    assert cost.multiplications(10, m, 4, input_scale=True) == (10 + 3) * m  # the last group is smaller


def test_measured_kernels_are_right_and_share_their_float_baseline(seed: int) -> None:
    from pipeline.cost_measured import measure

    rounds = []
    one, two = measure([24], 3, [1, 16], rounds=3, seed=seed, on_round=lambda done, total: rounds.append((done, total)))
    assert (one.channels, one.kernel, one.group, two.group) == (24, 3, 1, 16)
    assert one.float_us == two.float_us and one.onnxruntime_us == two.onnxruntime_us
    assert one.speedup == one.float_us / one.binary_us > 0
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match=r"kernel = 2: .* give an odd kernel to measure"):
        measure([8], 2, [1])


@pytest.mark.parametrize("arguments", [(0, 3, 64, 1), (1, 0, 64, 1), (1, 3, 0, 1), (1, 3, 64, 0)])
def test_refusals(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cost.speedup(*arguments)
