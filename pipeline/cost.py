"""The papers' cost model of a quantised convolution: operations counted, nothing timed.

Lyu et al., Cross-filter compression (arXiv 2005.09034), whose published text lost its formulas; they are rebuilt from
the words around them, and each is confirmed on a number that survived (see the docstrings). One layer has n filters of
q = c k_h k_w weights and m output pixels; M filters share a scale; a CPU does L binary operations at once; gamma is
the time of one multiply-accumulate (MAC) over the time of one such L-bit operation.
"""

from __future__ import annotations

from dataclasses import dataclass

GAMMA = 1.91  # TBN's (Wan et al., 2018), which the paper adopts: the only value near it that gives its boundaries


@dataclass(frozen=True)
class Cost:
    """A method's row of the paper's Table 2.

    Attributes:
        method: its title.
        macs: float multiply-accumulates per output pixel of a filter.
        binary_operations: bitwise operations and bit counts per weight and output pixel.
        additions: float additions per output pixel; what a MAC becomes where weights alone are quantised.
        speedup: over the float convolution.
        computed: by the model; else it is the papers' figure, which the model cannot give.
        published: what the method's paper says of its speed-up; in brackets where recalled, not read.
    """

    method: str
    macs: float
    binary_operations: float
    additions: float
    speedup: float
    computed: bool
    published: str


def weights_per_filter(channels: int, kernel: int) -> int:
    """q = c k k.

    Raises:
        ValueError: a layer without weights.
    """
    if channels < 1 or kernel < 1:
        raise ValueError(f"channels = {channels}, kernel = {kernel}: a convolution has at least 1 of each, give more")
    return channels * kernel * kernel


def _check(word: int, group: int) -> None:
    if word < 1 or group < 1:
        raise ValueError(f"word = {word}, group = {group}: give at least 1 bit a word and 1 filter a scale")


def speedup(channels: int, kernel: int, word: int = 64, group: int = 1, gamma: float = GAMMA) -> float:
    """S = gamma L M q / (M q + gamma L) (eq 17): q binary operations and 1 / M MACs an output, against q MACs.

    Rebuilt; with c = 256, 3x3, L = 64, M = 16 it is 121.84, the abstract's 122x. XNOR-Net's own eq 11 is M = gamma = 1.
    """
    q = weights_per_filter(channels, kernel)
    _check(word, group)
    return gamma * word * group * q / (group * q + gamma * word)


def boundary(word: int = 64, group: int = 1, gamma: float = GAMMA) -> float:
    """c = gamma L / (7 M) (eq 2, eq 19 with M): up to so many channels one 5x5 layer is cheaper than two 3x3.

    7 = 25 - 2 * 9, from 25 c^2 N / L + gamma c N / M <= 18 c^2 N / L + 2 gamma c N / M. Rebuilt; the paper's text keeps
    18 and 140 (L = 64 and 512) and 8.7 (L = 512, M = 16), which are these, the first two rounded up.
    """
    _check(word, group)
    return gamma * word / (7 * group)


def memory_ratio(channels: int, kernel: int, group: int = 1) -> float:
    """32 q / (q + 32 / M): float weights over bits and a float scale per M filters. The abstract's '~32x'."""
    q = weights_per_filter(channels, kernel)
    _check(1, group)
    return 32 * q / (q + 32 / group)


def table_speedup(
    macs: float, binary_operations: float, channels: int, kernel: int, word: int = 64, gamma: float = GAMMA
) -> float:
    """gamma q L / (MACs gamma L + operations q): Table 2's counting, which is TBN's.

    Rebuilt; with q = 2304 and L = 64 it gives TBN 40.04, XNOR 58.04 and HORQ 29.02, where those papers print 40, 58
    and about 30. It counts 2 binary operations a weight (XOR, bit count), so XNOR has half of eq 17's speed-up.
    """
    q = weights_per_filter(channels, kernel)
    return gamma * q * word / (macs * gamma * word + binary_operations * q)


def table(
    channels: int,
    kernel: int,
    word: int = 64,
    group: int = 1,
    order: int = 2,
    weight_bits: int = 2,
    activation_bits: int = 2,
    gamma: float = GAMMA,
) -> list[Cost]:
    """Table 2 for one layer; its counts survived or are TBN's, its speed-ups are recomputed.

    Args:
        group: M of the cross-filter rows.
        order: of HORQ.
        weight_bits, activation_bits: of DoReFa; any pair whose product is 4 has the 8 nmq operations of the paper.
    """
    q = weights_per_filter(channels, kernel)
    _check(word, group)
    bits = weight_bits * activation_bits

    def weights_only(method: str, macs: float, published: str) -> Cost:
        return Cost(method, macs, 0, q, 2.0, False, published)

    def bitwise(method: str, macs: float, operations: float, published: str) -> Cost:
        gain = table_speedup(macs, operations, channels, kernel, word, gamma)
        return Cost(method, macs, operations, 0, gain, True, published)

    return [
        Cost("full precision", q, 0, 0, 1.0, True, "1x"),
        *(weights_only(method, 0, "(~2x)") for method in ("TTQ", "TWN", "BWN", "BC")),
        weights_only(f"BW-CF{group}", 1 / group, "lost; taken as BWN's"),
        bitwise("BNN, BinaryNet", 0, 2, "(64x)"),
        bitwise("XNOR-Net", 2, 2, "58x"),
        bitwise(f"XNOR-CF{group}", 2 / group, 2, "lost; M = 16 by eq 17: 122x"),
        bitwise(f"HORQ, order {order}", 2 * order, 2 * order, "58x, ~30x, ~20x, ~15x by order"),
        bitwise(f"DoReFa {weight_bits}w{activation_bits}a", 1, 2 * bits, "(15x at 2w2a)"),
        bitwise("TBN", 1, 3, "40x"),
    ]


def multiplications(filters: int, pixels: int, group: int, input_scale: bool = False) -> int:
    """Float products that a layer with scaled float outputs truly needs: the honest reading of eq 17.

    The model charges nm / M. But sharing a scale saves scales, not outputs: each of the n m integer sums is still
    multiplied once, for any M. With the input scale K, forming alpha_g K(y, x) costs ceil(n / M) m more, and this alone
    is what M divides: 2nm for XNOR-Net, nm + nm / M for XNOR-CF. Where batch norm and sign follow, scale and norm fold
    into one integer threshold a channel, and there is no product at all, again for any M.
    """
    _check(1, group)
    forming = -(-filters // group) * pixels if input_scale else 0
    return filters * pixels + forming
