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

from pipeline.layers import QuantConv2d, QuantLinear, pad, window_mean
from pipeline.quantizers import BitWeight, sign
from tvm_ops import opset
from tvm_ops.bitplanes import pack


def _symbolic(name: str, inputs: tuple[Tensor, ...], shape: tuple[int, ...], **attributes: int) -> Tensor:
    """A node of our domain, while torch exports."""
    return torch.onnx.ops.symbolic(
        f"{opset.DOMAIN}::{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=opset.VERSION
    )


def _binary_sign(x: Tensor) -> Tensor:
    return _symbolic("BinarySign", (x,), x.shape) if torch.onnx.is_in_onnx_export() else sign(x)


def _accumulator(x: Tensor) -> Tensor:
    return _symbolic("Accumulator", (x,), x.shape) if torch.onnx.is_in_onnx_export() else x.to(torch.int32).float()


class PackedWeight(nn.Module):
    """1-bit weights [O, C, *kernel] as stored: words uint8 [O, T, ceil(C / 8)], scale float32 [ceil(O / group)]."""

    words: Tensor
    scale: Tensor

    def __init__(self, weight: BitWeight) -> None:
        super().__init__()
        self.shape = tuple(weight.signs.shape)
        taps_last = weight.signs.flatten(2) if weight.signs.dim() > 2 else weight.signs.unsqueeze(2)
        words = pack(taps_last.transpose(1, 2).cpu().numpy(), "u1")
        self.register_buffer("words", torch.from_numpy(words))
        self.register_buffer("scale", weight.scale.clone())
        self.group = weight.group

    def signs(self) -> Tensor:
        """float32 +-1 [O, C, *kernel]."""
        filters, channels = self.shape[:2]
        taps = int(np.prod(self.shape[2:]))
        if torch.onnx.is_in_onnx_export():
            signs = _symbolic("UnpackSigns", (self.words,), (filters, channels, taps), channels=channels)
        else:
            bits = self.words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=self.words.device) & 1
            signs = (bits.flatten(2)[..., :channels].float() * 2 - 1).transpose(1, 2)
        return signs.reshape(self.shape)

    def per_filter(self) -> Tensor:
        """float32 [O]."""
        filters = self.shape[0]
        if torch.onnx.is_in_onnx_export():
            return _symbolic("GroupScale", (self.scale,), (filters,), group=self.group, filters=filters)
        return self.scale.repeat_interleave(self.group)[:filters]


class BitConv2d(nn.Module):
    """A deployed `QuantConv2d`: y = scale_g * conv(sign(x), signs) [* K] [+ bias]."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.weight = PackedWeight(layer.weight_quantizer.encode(layer.weight))
        self.stride, self.pads, self.dilation = layer.stride, layer.pads, layer.dilation
        self.kernel, self.input_scale = layer.kernel_size, layer.input_scale
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes = pad(_binary_sign(x), self.pads)
        sums = _accumulator(F.conv2d(codes, self.weight.signs(), None, self.stride, 0, self.dilation))
        y = sums * self.weight.per_filter().view(-1, 1, 1)
        if self.input_scale:
            y = y * window_mean(x, self.kernel, self.stride, self.pads, self.dilation)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class BitLinear(nn.Module):
    """A deployed `QuantLinear`: y = scale_g * (sign(x) signs^T) [* mean |x|] [+ bias]."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.weight = PackedWeight(layer.weight_quantizer.encode(layer.weight))
        self.input_scale, self.bias = layer.input_scale, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _accumulator(F.linear(_binary_sign(x), self.weight.signs())) * self.weight.per_filter()
        if self.input_scale:
            y = y * x.abs().mean(1, keepdim=True)
        return y if self.bias is None else y + self.bias


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
    nn.BatchNorm1d: ChannelAffine,
    nn.BatchNorm2d: ChannelAffine,
    nn.Dropout: lambda _: nn.Identity(),
    nn.Dropout2d: lambda _: nn.Identity(),
}


def deploy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose layers are the deployed ones; ``model`` is untouched.

    Raises:
        ValueError: a batch norm without running statistics.
    """
    if type(model) in _DEPLOYED:
        return _DEPLOYED[type(model)](model).eval()
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in _DEPLOYED:
                setattr(parent, name, _DEPLOYED[type(child)](child))
    return model.requires_grad_(False)
