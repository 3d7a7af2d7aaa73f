"""SLBF: filters that select and stack low-dimensional binary filters from a set which the layer shares.

A filter of c channels is s segments of d = c / s channels, each one of m shared filters B_l = +-1 [d, kh, kw]:

    W^_t = [a_t1 B_z[t,1]; ...; a_ts B_z[t,s]]        z[t, j] = which filter, a = scale
    X * W^_t = sum_j a_tj F_j,z[t,j]                  F_jl = X_j * B_l: split, transform, merge

Lan and Lan, Compressing deep CNNs by stacking low-dimensional binary convolution filters, arXiv 2010.02778. Scales,
warm-up and balance follow the idea's parent, Yang et al., LegoNet, ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.layers import activation_quantizer, pad
from pipeline.quantizers import Method, ResidualQuantizer, sign
from tvm_ops.ops.stacked_conv2d import index_bits

Scale = Literal["none", "filter", "selection", "bank"]


METHOD = Method(
    title="SLBF",
    weight="stacked",
    activation="xnor",
    weight_levels="-a, +a",
    activation_levels="-1, +1",
    weight_bits=1,
    activation_bits=1,
    operations="XOR, bitcount",
    formula="filters of s segments, each one of m shared sign(R); 1 / (rho s) + log2(m) / (d k^2) bits a weight",
    source="Lan and Lan 2021, arXiv 2010.02778",
)


@dataclass(frozen=True)
class StackedWeight:
    """A stacked weight as it is deployed, n filters of s d channels.

    bank: float32 +-1 [m, d, kh, kw], the shared filters. indices: int64 [n, s], z[t, j] < m.
    scale: float32, by ``kind``: 'none' has none, 'filter' [ceil(n / group)], ``group`` neighbouring filters share one,
    'selection' [n, s], 'bank' [m].
    """

    bank: Tensor
    indices: Tensor
    scale: Tensor | None = None
    kind: Scale = "none"
    group: int = 1

    def signs(self) -> Tensor:
        """The stacked filters without their scale, +-1 [n, s d, kh, kw]."""
        return self.bank[self.indices].flatten(1, 2)

    def scales(self) -> Tensor:
        """a_tj, the scale of every selection, float32 [n, s]."""
        return _spread(self.scale, self.indices, self.kind, self.group)

    def dequantize(self) -> Tensor:
        """The stacked filters, float32 [n, s d, kh, kw]."""
        return (self.bank[self.indices] * self.scales()[:, :, None, None, None]).flatten(1, 2)

    def bits(self) -> int:
        """Stored bits: m d kh kw of the bank, n s ceil(log2 m) of indices, 32 of every scale."""
        floats = 0 if self.scale is None else self.scale.numel()
        return self.bank.numel() + self.indices.numel() * index_bits(len(self.bank)) + 32 * floats


def ratio(in_channels: int, out_channels: int, area: int, segments: int, bank: int) -> float:
    """How many times smaller than float32, scales apart: 32 / (1 / (rho s) + log2(m) / (d k^2)), rho = n / m.

    ``area`` is k^2 = kh kw. Indices count log2(m) bits; `StackedWeight.bits` counts whole ones.
    """
    return 32 / (bank / (out_channels * segments) + math.log2(bank) * segments / (in_channels * area))


def _spread(scale: Tensor | None, indices: Tensor, kind: Scale, group: int) -> Tensor:
    """a_tj [n, s] of a scale in its stored shape."""
    if scale is None:
        return torch.ones(indices.shape, device=indices.device)
    match kind:
        case "bank":
            return scale[indices]
        case "filter":
            return scale.repeat_interleave(group)[: len(indices), None].expand_as(indices)
    return scale


def _least_squares(mean: Tensor, indices: Tensor, kind: Scale, group: int, bank: Tensor) -> Tensor:
    """The scale >= 0 in its stored shape that leaves the least error; ``bank`` [m]: of filters that none selects.

    mean: [n, s], <W_tj, B_z[t,j]> / (d kh kw). All segments weigh alike, so a shared optimum is the mean of its own.
    'none' has one per filter here, which the following batch norm takes.
    """
    match kind:
        case "bank":
            best = bank.scatter_reduce(0, indices.flatten(), mean.flatten(), "mean", include_self=False)
        case "selection":
            best = mean
        case _:
            best = torch.stack([part.mean() for part in mean.split(group)])
    return best.clamp_min(0)  # B takes the sign: with a < 0 the nearest filter would be the farthest


def _check(channels: int, area: int, segments: int, bank: int, kind: Scale, group: int) -> None:
    if segments < 1 or channels % segments:
        raise ValueError(f"segments = {segments} does not divide {channels} input channels: give a divisor")
    if bank < 2:
        raise ValueError(f"bank = {bank} leaves nothing to select: give 2 filters or more")
    if math.log2(bank) >= channels // segments * area:
        size = channels // segments * area
        raise ValueError(
            f"bank = {bank}: an index is no shorter than its filter of {size} bits, give less than 2^{size}"
        )
    if kind not in get_args(Scale):
        raise ValueError(f"scale = '{kind}': choose one of {', '.join(get_args(Scale))}")
    if group < 1 or (group > 1 and kind != "filter"):
        raise ValueError(f"group = {group} with scale = '{kind}': give 1; scale = 'filter' takes more")


def from_dense(
    weight: Tensor,
    segments: int,
    bank: int,
    scale: Scale = "filter",
    group: int = 1,
    iterations: int = 20,
    seed: int = 0,
) -> StackedWeight:
    """The stacked weight near ``weight`` [n, c, kh, kw], without data: coordinate descent on ||W - W^||^2.

        z[t, j] = argmax_l <W_tj, B_l>,   a: least squares, >= 0,   B_l = sign(sum_{z[t,j]=l} a_tj W_tj)

    in turn (with scale 'bank' z is the argmin of ||W_tj - a_l B_l||), so the error never rises from one iteration to
    the next. A filter that none selects adds no error, so it may become any other: the signs of the segment that gains
    most by it.
    With scale 'none' the error is that of the best scale per filter: the batch norm behind has to learn it.

    Raises:
        ValueError: a bank or a scale that the shape does not allow.
    """
    n, channels, kh, kw = weight.shape
    _check(channels, kh * kw, segments, bank, scale, group)
    area = channels // segments * kh * kw
    w = weight.detach().double().reshape(n * segments, area)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(w), generator=generator)[torch.arange(bank) % len(w)].to(w.device)
    filters, each = sign(w[first]).double(), w[first].abs().mean(1)  # B, and a_l for kind 'bank'

    def assign() -> tuple[Tensor, Tensor, Tensor]:
        """z, a in its stored shape, and <W_tj, B_z[t,j]> / area."""
        means = w @ filters.T / area
        nearest = (each * (2 * means - each) if scale == "bank" else means).argmax(1)
        chosen = means.gather(1, nearest[:, None]).view(n, segments)
        indices = nearest.view(n, segments)
        return indices, _least_squares(chosen, indices, scale, group, each), chosen

    for _ in range(iterations):
        indices, best, chosen = assign()
        a = _spread(best, indices, "filter" if scale == "none" else scale, group)
        filters = sign(torch.zeros_like(filters).index_add(0, indices.flatten(), a.reshape(-1, 1) * w)).double()
        each = best if scale == "bank" else each
        empty = (indices.flatten().bincount(minlength=bank) == 0).nonzero().flatten()[: len(w)]
        gain = w.abs().mean(1) - chosen.flatten()
        seeds = w[gain.topk(len(empty)).indices]
        filters[empty], each[empty] = sign(seeds).double(), seeds.abs().mean(1)
    indices, best, _ = assign()
    stored = None if scale == "none" else best.float()
    return StackedWeight(filters.float().view(bank, -1, kh, kw), indices, stored, scale, group)


class _Binary(torch.autograd.Function):
    """B = sign(R); dL/dR = dL/dB 1{|R| <= 1}."""

    @staticmethod
    def forward(ctx: Any, proxy: Tensor) -> Tensor:
        ctx.save_for_backward(proxy)
        return sign(proxy)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (proxy,) = ctx.saved_tensors
        return g * (proxy.abs() <= 1)


class _Select(torch.autograd.Function):
    """P = onehot(argmax_l Q); dL/dQ = dL/dP + balance (max(f_l - ceil(f), 0) - max(floor(f) - f_l, 0)).

    f_l counts how often filter l is selected in the layer, f = n s / m is the mean: descent leaves filters in too much
    demand and takes up those in too little (LegoNet). Q, P: [s, n, m].
    """

    @staticmethod
    def forward(ctx: Any, proxy: Tensor, balance: float) -> Tensor:
        index = proxy.argmax(2)
        ctx.save_for_backward(index)
        ctx.balance = balance
        return F.one_hot(index, proxy.shape[2]).to(proxy.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        count, bank = index.flatten().bincount(minlength=g.shape[2]), g.shape[2]
        above, below = count - -(-index.numel() // bank), index.numel() // bank - count
        return g + ctx.balance * (above.clamp_min(0) - below.clamp_min(0)), None


class StackedConv2d(nn.Module):
    """A convolution of quantised activations with stacked binary filters.

    x: float32 [N, C, H, W] -> float32 [N, O, OH, OW], y = conv(q(x), W^) + bias, zero padding of the codes.
    In training split-transform-merge, in evaluation the stacked filters; on integers both give the same bits for scale
    'none' and 'filter', which multiplies last.

    Parameters are the proxies ``bank`` R [m, d, kh, kw] and ``selection`` Q [s, n, m], and ``scale`` a. Gradients, with
    T = y before the bias:
        dL/dQ_jtl = dL/dP_jtl = a_tj <dL/dT_t, F_jl>, for every l (kind 'bank': a_l); `_Select` adds the balance
        dL/dR_l = 1{|R_l| <= 1} sum_{z[t,j]=l} a_tj corr(X_j, dL/dT_t)
        dL/da_tj = <dL/dT_t, F_j,z[t,j]>, summed over whatever shares the scale
    The clipping of R is BNN's convention; the paper's own could not be recovered.

    Args:
        padding: zeros on every side, or (top, left, bottom, right).
        segments: s, a divisor of ``in_channels``.
        bank: m. At most m^s filters differ: one segment and m < n makes equal channels.
        scale: what a real scale belongs to; 'none' leaves it to the following batch norm.
        group: neighbouring filters per scale of kind 'filter'.
        activation, activation_options: name and arguments of the activation quantiser.
        balance: weight of the balance in dL/dQ.

    Raises:
        ValueError: a bank, a scale or an activation that the layer does not allow.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int, int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        *,
        segments: int,
        bank: int,
        scale: Scale = "filter",
        group: int = 1,
        activation: str = "xnor",
        activation_options: Mapping[str, Any] = {},
        balance: float = 1e-4,
    ) -> None:
        super().__init__()
        kh, kw = _pair(kernel_size)
        _check(in_channels, kh * kw, segments, bank, scale, group)
        self.in_channels, self.out_channels, self.segments = in_channels, out_channels, segments
        self.kernel_size, self.stride, self.dilation = (kh, kw), _pair(stride), _pair(dilation)
        self.pads = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.kind, self.group, self.balance = scale, group, balance
        self.activation_quantizer = activation_quantizer(activation, activation_options)
        if isinstance(self.activation_quantizer, ResidualQuantizer):
            raise ValueError(f"activation = '{activation}': stacked filters take one plane of codes, choose another")
        self.bank = nn.Parameter(torch.empty(bank, in_channels // segments, kh, kw))
        self.selection = nn.Parameter(torch.empty(segments, out_channels, bank))
        self.scale = None if scale == "none" else nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R as torch's convolution of all input channels, Q normal, the scale that fits the stack of R best."""
        bound = (self.in_channels * math.prod(self.kernel_size)) ** -0.5
        nn.init.uniform_(self.bank, -bound, bound)
        nn.init.kaiming_normal_(self.selection)
        if self.scale is not None:
            each, indices = self.bank.abs().mean((1, 2, 3)), self.selection.argmax(2).T
            self.scale.data = _least_squares(each[indices], indices, self.kind, self.group, each)

    def encode(self) -> StackedWeight:
        """The deployed form: its ``dequantize()`` is the weight of the evaluation forward."""
        bank, indices = sign(self.bank.detach()), self.selection.argmax(2).T.contiguous()
        return StackedWeight(bank, indices, None if self.scale is None else self.scale.detach(), self.kind, self.group)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, iterations: int = 20, seed: int = 0) -> None:
        """Start from the dense ``weight`` [n, c, kh, kw] through `from_dense`; the proxies keep their magnitudes."""
        m = len(self.bank)
        start = from_dense(weight, self.segments, m, self.kind, self.group, iterations, seed)
        self.bank.copy_(start.bank * self.bank.abs().clamp_min(1e-6))  # a zero would have the sign +1
        index, top = start.indices.T[:, :, None].to(self.selection.device), self.selection.max(2, keepdim=True)
        self.selection.scatter_(2, top.indices, self.selection.gather(2, index)).scatter_(2, index, top.values)
        if self.scale is not None and start.scale is not None:
            self.scale.copy_(start.scale)

    def freeze_selection_(self, frozen: bool = True) -> None:
        """Keep the selection as it is; no gradient, so that neither momentum nor weight decay moves it."""
        self.selection.requires_grad_(not frozen)
        self.selection.grad = None

    def forward(self, x: Tensor) -> Tensor:
        codes = pad(self.activation_quantizer(x), self.pads)
        per_filter = self.scale if self.kind == "filter" else None
        if self.training:
            y = self._split_transform_merge(codes)
        else:
            filters = self.encode().dequantize() if per_filter is None else self.encode().signs()
            y = F.conv2d(codes, filters, None, self.stride, 0, self.dilation)
        if per_filter is not None:
            y = y * per_filter.repeat_interleave(self.group)[: self.out_channels, None, None]
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _split_transform_merge(self, codes: Tensor) -> Tensor:
        """sum_jl P_jtl [a] F_jl for padded codes [N, C, H, W] -> [N, O, OH, OW]; not the scale of kind 'filter'."""
        parts = codes.unflatten(1, (self.segments, -1)).flatten(0, 1)  # the segments share the bank: more images
        maps = F.conv2d(parts, _Binary.apply(self.bank), None, self.stride, 0, self.dilation)  # [N s, m, OH, OW]
        select = _Select.apply(self.selection, self.balance)
        if self.scale is not None and self.kind != "filter":
            select = select * (self.scale.T[:, :, None] if self.kind == "selection" else self.scale)
        # a matrix product: as a convolution CUDA would round the maps to TF32
        y = select.movedim(0, 1).flatten(1) @ maps.reshape(len(codes), -1, maps[0, 0].numel())
        return y.unflatten(2, maps.shape[2:])


@torch.no_grad()
def constrain_(model: nn.Module) -> None:
    """Clip R to [-1, 1], outside of which it has no gradient; call it after each optimiser step."""
    for layer in model.modules():
        if isinstance(layer, StackedConv2d):
            layer.bank.clamp_(-1, 1)


def begin_epoch(model: nn.Module, epoch: int, warmup: int) -> None:
    """Train the selections in the first ``warmup`` epochs only: call it before each, counted from 0 (LegoNet: 10)."""
    for layer in model.modules():
        if isinstance(layer, StackedConv2d):
            layer.freeze_selection_(epoch >= warmup)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
