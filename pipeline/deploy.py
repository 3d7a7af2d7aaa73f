"""A trained network in the form that is stored and compiled: packed bits, group scales, batch norms as scale and shift.

The deployed network is the reference of every later stage: its integers are what ONNX Runtime and compiled code must
reproduce bit for bit, and every float operation between them rounds where theirs do (one product, one sum at a time).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.layers import QuantConv2d, QuantLinear, pad, taps_first, unfold, window_mean
from pipeline.quantizers import ActivationQuantizer, CodedWeight, ResidualQuantizer, sign
from pipeline.stacked import StackedConv2d
from tvm_ops import opset
from tvm_ops.bitplanes import Code, encode, pack
from tvm_ops.ops.stacked_conv2d import index_bits, pack_indices, unpack_indices


def _symbolic(name: str, inputs: tuple[Tensor, ...], shape: tuple[int, ...], **attributes: int | list[int]) -> Tensor:
    """A node of our domain, while torch exports."""
    return torch.onnx.ops.symbolic(
        f"{opset.DOMAIN}::{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=opset.VERSION
    )


def _binary_sign(x: Tensor) -> Tensor:
    return _symbolic("BinarySign", (x,), x.shape) if torch.onnx.is_in_onnx_export() else sign(x)


def _codes(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    if not torch.onnx.is_in_onnx_export():
        return quantizer.codes(x)
    constants, attributes = quantizer.operands()
    return _symbolic(quantizer.operator, (x, *constants), x.shape, **attributes)


def _accumulator(x: Tensor) -> Tensor:
    return _symbolic("Accumulator", (x,), x.shape) if torch.onnx.is_in_onnx_export() else x.to(torch.int32).float()


def _per_filter(scale: Tensor, group: int, filters: int) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        return _symbolic("GroupScale", (scale,), (filters,), group=group, filters=filters)
    return scale.repeat_interleave(group)[:filters]


class PackedWeight(nn.Module):
    """Coded weights [O, C, *kernel] as stored: words uint8 [P, O, T, ceil(C / 8)], scales float32 [ceil(O / group)].

    The scales include ``unit``, what an activation code's unit is worth. Where codes below zero have a scale of their
    own, ``negative`` is it.
    """

    words: Tensor
    scale: Tensor
    negative: Tensor | None

    def __init__(self, weight: CodedWeight, unit: float) -> None:
        super().__init__()
        self.shape, self.code, self.group = tuple(weight.codes.shape), weight.code, weight.group
        taps_last = weight.codes.flatten(2) if weight.codes.dim() > 2 else weight.codes.unsqueeze(2)
        planes = encode(taps_last.transpose(1, 2).cpu().numpy(), weight.code)
        self.register_buffer("words", torch.from_numpy(pack(planes, "u1")))
        self.register_buffer("scale", (weight.scale.double() * unit).float())
        negative = weight.negative
        self.register_buffer("negative", None if negative is None else (negative.double() * unit).float())

    def codes(self) -> Tensor:
        """float32 integers [O, C, *kernel]."""
        filters, channels = self.shape[:2]
        taps = int(np.prod(self.shape[2:]))
        ratios, shift = self.code.ratios, self.code.shift
        if torch.onnx.is_in_onnx_export():
            attributes = {"channels": channels, "ratios": list(ratios), "shift": shift}
            codes = _symbolic("UnpackCodes", (self.words,), (filters, channels, taps), **attributes)
        else:
            bits = self.words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=self.words.device) & 1
            worth = torch.tensor(ratios, device=bits.device).view(-1, 1, 1, 1)
            codes = ((bits.flatten(3)[..., :channels] * worth).sum(0) + shift).float().transpose(1, 2)
        return codes.reshape(self.shape)

    def per_filter(self, scale: Tensor) -> Tensor:
        """A scale of groups for every filter, float32 [O]."""
        return _per_filter(scale, self.group, self.shape[0])


class _Deployed(nn.Module):
    """What deployed layers share: sums of integer codes, each times its scale.

        codes of one scale       y = scale_g * sums
        residual planes          y = sum_j (scale_g * sums_j) * b_j
        codes < 0 of their own   scale_g * sums becomes scale_g * sums of codes > 0 less negative_g * sums of the rest
        real activations         y = scale_g * (x times codes), a float sum

    Raises:
        ValueError: sums that float32 cannot hold.
    """

    def __init__(self, layer: QuantConv2d | QuantLinear) -> None:
        super().__init__()
        self.activation = copy.deepcopy(layer.activation_quantizer)
        weight = layer.weight_quantizer.encode(layer.weight)
        self.weight = PackedWeight(weight, self.activation.scale)
        self.input_scale, self.bias = layer.input_scale, layer.bias
        _check_limit(layer, self.activation.code, weight)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution or matrix product of codes or real numbers."""
        raise NotImplementedError

    def column(self, per_filter: Tensor) -> Tensor:
        """[O], to be broadcast over the result of `multiply`."""
        raise NotImplementedError

    def input_mean(self, x: Tensor) -> Tensor:
        """K of every output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.activation, ResidualQuantizer):
            planes = self.activation.planes(self.windows(x), _binary_sign)
            first, *others = (self._scaled(plane) * b for plane, b in planes)
            y = sum(others, first)
        elif self.activation.code is None:
            y = self._scaled_real(x)
        else:
            y = self._scaled(_codes(x, self.activation))
        if self.input_scale:
            y = y * self.input_mean(x)
        return y if self.bias is None else y + self.column(self.bias)

    def windows(self, x: Tensor) -> Tensor:
        """What a residual quantiser takes."""
        return x

    def _scaled(self, codes: Tensor) -> Tensor:
        weight, scale = self.weight.codes(), self._scale(self.weight.scale)
        if self.weight.negative is None:
            return _accumulator(self.multiply(codes, weight)) * scale
        positive, negative = weight.clamp(min=0), (-weight).clamp(min=0)
        below = _accumulator(self.multiply(codes, negative)) * self._scale(self.weight.negative)
        return _accumulator(self.multiply(codes, positive)) * scale - below

    def _scaled_real(self, x: Tensor) -> Tensor:
        weight, scale = self.weight.codes(), self.weight.per_filter(self.weight.scale)
        if self.weight.negative is None:
            return self.multiply(x, weight) * self.column(scale)
        filters = (-1, *[1] * (weight.dim() - 1))
        negative = self.weight.per_filter(self.weight.negative).view(filters)
        return self.multiply(x, weight.clamp(min=0) * scale.view(filters) - (-weight).clamp(min=0) * negative)

    def _scale(self, scale: Tensor) -> Tensor:
        return self.column(self.weight.per_filter(scale))


def _check_limit(layer: nn.Module, code: Code | None, weight: CodedWeight) -> None:
    largest = 0 if code is None else weight.codes[0].numel() * code.largest * weight.code.largest
    if largest >= 1 << 24:
        raise ValueError(
            f"{layer}: sums may reach {largest}, and float32 holds integers only to 2^24: use fewer bits or channels"
        )


class BitConv2d(_Deployed):
    """A deployed `QuantConv2d`."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__(layer)
        self.stride, self.pads, self.dilation, self.kernel = layer.stride, layer.pads, layer.dilation, layer.kernel_size
        self.unfolds = isinstance(self.activation, ResidualQuantizer) and self.activation.per_window

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.unfolds:
            return F.conv2d(x, taps_first(weight))
        return F.conv2d(pad(x, self.pads), weight, None, self.stride, 0, self.dilation)

    def windows(self, x: Tensor) -> Tensor:
        return unfold(pad(x, self.pads), self.kernel, self.stride, self.dilation) if self.unfolds else x

    def column(self, per_filter: Tensor) -> Tensor:
        return per_filter.view(-1, 1, 1)

    def input_mean(self, x: Tensor) -> Tensor:
        return window_mean(x, self.kernel, self.stride, self.pads, self.dilation)


class BitLinear(_Deployed):
    """A deployed `QuantLinear`."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def column(self, per_filter: Tensor) -> Tensor:
        return per_filter

    def input_mean(self, x: Tensor) -> Tensor:
        return x.abs().mean(1, keepdim=True)


class BitStackedConv2d(nn.Module):
    """A deployed `StackedConv2d`: the bank, 1 bit an entry, and as few bits an index as tell its filters apart.

    scale 'none', 'filter'        y = [scale_g *] sums
    scale 'selection', 'bank'     y = sum_j a_tj * sums_tj, j the segment
    """

    bias: Tensor | None

    def __init__(self, layer: StackedConv2d) -> None:
        super().__init__()
        weight = layer.encode()
        filters, self.segments = weight.indices.shape
        self.shape = (filters, *weight.bank.shape[1:])  # of the filters of one segment
        self.activation, unit = copy.deepcopy(layer.activation_quantizer), layer.activation_quantizer.scale
        self.stride, self.pads, self.dilation, self.bias = layer.stride, layer.pads, layer.dilation, layer.bias
        self.bank = PackedWeight(CodedWeight(weight.bank, torch.ones(1), len(weight.bank)), 1.0)
        self.bank_size, self.per_segment = len(weight.bank), weight.kind in ("selection", "bank")
        if self.per_segment:
            parts, self.group = list(zip(weight.indices.T, weight.scales().T, strict=True)), 1
        elif weight.scale is None:
            parts, self.group = [(weight.indices, torch.ones(1))], filters
        else:
            parts, self.group = [(weight.indices, weight.scale)], weight.group
        for j, (indices, scale) in enumerate(parts):
            words = pack_indices(indices.cpu().numpy(), self.bank_size)
            self.register_buffer(f"indices{j}", torch.from_numpy(words))
            self.register_buffer(f"scale{j}", (scale.double() * unit).float().contiguous())
        if self.activation.code is not None:
            _check_limit(layer, self.activation.code, CodedWeight(weight.signs(), torch.ones(1), filters))

    def forward(self, x: Tensor) -> Tensor:
        codes = x if self.activation.code is None else _codes(x, self.activation)
        d = self.shape[1]  # slices, because ONNX's Split has several outputs
        parts = [codes[:, j * d : (j + 1) * d] for j in range(self.segments)] if self.per_segment else [codes]
        bank = self.bank.codes()
        first, *others = (self._scaled(j, part, bank) for j, part in enumerate(parts))
        y = sum(others, first)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _scaled(self, j: int, codes: Tensor, bank: Tensor) -> Tensor:
        """The sums of index words ``j`` times their scale."""
        sums = F.conv2d(pad(codes, self.pads), self._filters(j, bank), None, self.stride, 0, self.dilation)
        scale = _per_filter(self.get_buffer(f"scale{j}"), self.group, self.shape[0])
        return (sums if self.activation.code is None else _accumulator(sums)) * scale.view(-1, 1, 1)

    def _filters(self, j: int, bank: Tensor) -> Tensor:
        words, segments = self.get_buffer(f"indices{j}"), 1 if self.per_segment else self.segments
        filters, d, kh, kw = self.shape
        if torch.onnx.is_in_onnx_export():
            attributes = {"filters": filters, "segments": segments, "bits": index_bits(self.bank_size)}
            shape = (filters, segments * d, kh * kw)
            stacked = _symbolic("StackFilters", (bank.flatten(2), words), shape, **attributes)
        else:
            indices = unpack_indices(words.cpu().numpy(), filters * segments, index_bits(self.bank_size))
            stacked = bank[torch.from_numpy(indices).to(bank.device)]
        return stacked.reshape(filters, segments * d, kh, kw)


class ChannelAffine(nn.Module):
    """A batch norm after training: x * scale + shift, rounded twice, per channel of [N, C] or [N, C, H, W]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a batch norm without running statistics cannot be deployed: use track_running_stats=True")
        gamma = norm.weight if norm.affine else torch.ones_like(norm.running_mean)
        beta = norm.bias if norm.affine else torch.zeros_like(norm.running_mean)
        scale = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
        shape = (-1, *[1] * (2 if isinstance(norm, nn.BatchNorm2d) else 0))
        self.register_buffer("scale", scale.float().detach().view(shape))
        shift = beta.double() - norm.running_mean.double() * scale
        self.register_buffer("shift", shift.float().detach().view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


_DEPLOYED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    QuantConv2d: BitConv2d,
    QuantLinear: BitLinear,
    StackedConv2d: BitStackedConv2d,
    nn.BatchNorm1d: ChannelAffine,
    nn.BatchNorm2d: ChannelAffine,
    nn.Dropout: lambda _: nn.Identity(),
    nn.Dropout2d: lambda _: nn.Identity(),
}


def deploy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose layers are the deployed ones; ``model`` is untouched.

    Raises:
        ValueError: a batch norm without running statistics; a layer whose sums float32 cannot hold.
    """
    if type(model) in _DEPLOYED:
        return _DEPLOYED[type(model)](model).eval()
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in _DEPLOYED:
                setattr(parent, name, _DEPLOYED[type(child)](child))
    return model.requires_grad_(False)
