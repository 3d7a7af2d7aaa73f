"""The number format against plain integer arithmetic on decoded codes, for any length, word and pair of codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ops.bitplanes import BINARY, TERNARY, Code, decode, dot, encode, odd, pack, unpack, unsigned

CODES = {
    "binary": BINARY,
    "ternary": TERNARY,
    **{f"unsigned {k}-bit": unsigned(k) for k in (1, 2, 3, 4, 8)},
    **{f"odd {k}-bit": odd(k) for k in (2, 3, 4, 8)},
}
WORDS = ("<u4", "u1", "<u2", "<u8")
lengths = st.one_of(st.integers(1, 200), st.sampled_from((7, 8, 9, 31, 32, 33, 63, 64, 65)))
seeds = st.integers(0, 2**32 - 1)


def signs(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), shape)


@given(lengths, st.sampled_from(WORDS), st.lists(st.integers(1, 3), max_size=2), seeds)
def test_unpack_inverts_pack(count: int, dtype: str, outer: list[int], seed: int) -> None:
    planes = signs(seed, *outer, count)
    words = pack(planes, dtype)
    assert words.dtype == np.dtype(dtype)
    assert words.shape == (*outer, -(-count // (8 * words.itemsize)))
    restored = unpack(words, count)
    assert restored.dtype == np.bool_
    np.testing.assert_array_equal(restored, planes > 0)


@given(lengths, st.sampled_from(WORDS), seeds)
def test_bit_k_of_the_words_is_sign_k_and_the_tail_is_zero(count: int, dtype: str, seed: int) -> None:
    planes = signs(seed, count)
    words = pack(planes, dtype)
    width = 8 * words.itemsize
    number = sum(int(word) << (width * i) for i, word in enumerate(words))
    assert number == sum(1 << k for k in range(count) if planes[k] > 0)
    assert number >> count == 0


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_only_what_is_above_zero_is_a_one(dtype: type) -> None:
    values = np.array([-1, 0, 1, 1]).astype(dtype)
    assert pack(values)[0] == sum(1 << i for i, value in enumerate(values) if value > 0)


@pytest.mark.parametrize("layout", ["transposed", "reversed", "strided"])
def test_packing_does_not_need_contiguous_signs(layout: str, seed: int) -> None:
    base = signs(seed, 40, 66)
    view = {"transposed": base.T, "reversed": base[:, ::-1], "strided": base[:, ::2]}[layout]
    np.testing.assert_array_equal(unpack(pack(view), view.shape[-1]), view > 0)


@given(st.sampled_from(sorted(CODES)), st.sampled_from(sorted(CODES)), lengths, st.sampled_from(WORDS), seeds)
def test_dot_is_the_inner_product_of_the_decoded_codes(a: str, w: str, count: int, dtype: str, seed: int) -> None:
    x, y = signs(seed, len(CODES[a].ratios), 3, count), signs(seed + 1, len(CODES[w].ratios), 3, count)
    expected = [
        sum(int(p) * int(q) for p, q in zip(row_x, row_y, strict=True))
        for row_x, row_y in zip(decode(x, CODES[a]), decode(y, CODES[w]), strict=True)
    ]
    result = dot(pack(x, dtype), pack(y, dtype), count, CODES[a], CODES[w])
    assert result.dtype == np.int64
    assert result.tolist() == expected


@pytest.mark.parametrize("w", CODES)
@pytest.mark.parametrize("a", CODES)
def test_dot_broadcasts_every_pair_of_codes(a: str, w: str, seed: int) -> None:
    x, y = signs(seed, len(CODES[a].ratios), 4, 1, 45), signs(seed + 1, len(CODES[w].ratios), 1, 5, 45)
    expected = np.einsum("iak,akj->ij", decode(x, CODES[a]), decode(y, CODES[w]).transpose(0, 2, 1))
    np.testing.assert_array_equal(dot(pack(x), pack(y), 45, CODES[a], CODES[w]), expected)


@pytest.mark.parametrize("count", [1, 33, 2**17])
def test_the_extreme_sums(count: int) -> None:
    ones = pack(np.ones((1, count)))
    minus = pack(-np.ones((1, count)))
    assert dot(ones, ones, count) == count
    assert dot(ones, minus, count) == -count


@pytest.mark.parametrize("name", CODES)
def test_the_values_of_a_code(name: str) -> None:
    k = CODES[name].bits
    expected = {
        "binary": (-1, 1),
        "ternary": (-1, 0, 1),
        f"unsigned {k}-bit": tuple(range(2**k)),
        f"odd {k}-bit": tuple(range(1 - 2**k, 2**k, 2)),
    }[name]
    assert CODES[name].values == expected
    assert CODES[name].largest == max(map(abs, expected))


@pytest.mark.parametrize("name", CODES)
def test_decode_inverts_encode(name: str, seed: int) -> None:
    code = CODES[name]
    values = np.random.default_rng(seed).choice(np.array(code.values), (3, 50))
    planes = encode(values, code)
    assert planes.shape == (code.bits, 3, 50)
    np.testing.assert_array_equal(decode(planes, code), values)


@pytest.mark.parametrize(("name", "value"), [("binary", 0), ("ternary", 2), ("unsigned 2-bit", 4), ("odd 2-bit", -2)])
def test_a_value_that_the_code_lacks_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{value} is no value of "):
        encode(np.array([CODES[name].values[0], value]), CODES[name])


@pytest.mark.parametrize("ratios", [(), (0,), (1, 0)])
def test_a_code_without_planes_is_refused(ratios: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one plane, each worth something"):
        Code(ratios)


def test_unpacking_does_not_need_contiguous_words(seed: int) -> None:
    base = signs(seed, 40, 96)
    expected = np.concatenate((base[:, :32], base[:, 64:]), 1) > 0
    np.testing.assert_array_equal(unpack(pack(base)[:, ::2], 64), expected)
    np.testing.assert_array_equal(unpack(pack(base).T.copy().T[:, :1], 32), base[:, :32] > 0)


@pytest.mark.parametrize("side", ["a", "w"])
def test_planes_that_do_not_fit_the_code_are_refused(side: str) -> None:
    two, one = pack(np.ones((2, 8))), pack(np.ones((1, 8)))
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        dot(*((two, one) if side == "a" else (one, two)), 8)
