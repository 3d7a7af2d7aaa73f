"""Quantised layers: a torch layer, a weight quantiser and an activation quantiser, each by name."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import quantizers
from pipeline.quantizers import ActivationQuantizer, ResidualQuantizer, WeightQuantizer, checked_integer
from pipeline.quantizers.dorefa import quantize_gradient

Kind = TypeVar("Kind", type[WeightQuantizer], type[ActivationQuantizer])


class QuantConv2d(nn.Conv2d):
    """A convolution of quantised activations with quantised weights.

    x: float32 [N, C, H, W] -> float32 [N, O, OH, OW],
        y = conv(q(x), w(W)) [* K] + bias, zero padding of the codes (a padded tap adds nothing).
    An activation quantiser that works per window (HORQ) quantises every receptive field of the zero-padded x.
    With ``input_scale``, K(y, x) = the mean over the window of mean_c |x|, zeros counted (XNOR-Net section 3.2,
    CF section 1.3); published accuracies are reproduced without it.

    Args:
        padding: zeros on every side, or (top, left, bottom, right).
        weight: name of the weight quantiser.
        activation: name of the activation quantiser.
        group: M, neighbouring filters per scale.
        weight_options: further arguments of the weight quantiser, such as {"bits": 2}.
        activation_options: arguments of the activation quantiser.
        gradient_bits: of the gradient that comes back to y (DoReFa's G); 32: as it is.

    Raises:
        ValueError: a quantiser or an option that does not exist, or quantisers that do not go together.
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
        weight: str = "bwn",
        activation: str = "xnor",
        group: int = 1,
        weight_options: Mapping[str, Any] = {},
        activation_options: Mapping[str, Any] = {},
        input_scale: bool = False,
        gradient_bits: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, bias=bias)
        self.pads = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.weight_quantizer = _weight_quantizer(weight, group, weight_options)
        self.activation_quantizer = activation_quantizer(activation, activation_options)
        self.input_scale = _checked_input_scale(input_scale, activation)
        self.gradient_bits = checked_integer("gradient_bits", gradient_bits, 32)

    def forward(self, x: Tensor) -> Tensor:
        quantize, weight = self.activation_quantizer, self.weight_quantizer(self.weight)
        if isinstance(quantize, ResidualQuantizer) and quantize.per_window:
            windows = unfold(pad(x, self.pads), self.kernel_size, self.stride, self.dilation)
            y = F.conv2d(quantize(windows), taps_first(weight))
        else:
            y = F.conv2d(pad(quantize(x), self.pads), weight, None, self.stride, 0, self.dilation)
        if self.input_scale:
            y = y * window_mean(x, self.kernel_size, self.stride, self.pads, self.dilation)
        y = y if self.bias is None else y + self.bias.view(-1, 1, 1)
        return y if self.gradient_bits == 32 else quantize_gradient(y, self.gradient_bits)


class QuantLinear(nn.Linear):
    """A dense layer of quantised activations and weights: y = q(x) w(W)^T [* mean |x|] + bias.

    x: float32 [N, C] -> float32 [N, O]. Arguments as in `QuantConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        weight: str = "bwn",
        activation: str = "xnor",
        group: int = 1,
        weight_options: Mapping[str, Any] = {},
        activation_options: Mapping[str, Any] = {},
        input_scale: bool = False,
        gradient_bits: int = 32,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.weight_quantizer = _weight_quantizer(weight, group, weight_options)
        self.activation_quantizer = activation_quantizer(activation, activation_options)
        self.input_scale = _checked_input_scale(input_scale, activation)
        self.gradient_bits = checked_integer("gradient_bits", gradient_bits, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.activation_quantizer(x), self.weight_quantizer(self.weight))
        if self.input_scale:
            y = y * x.abs().mean(1, keepdim=True)
        y = y if self.bias is None else y + self.bias
        return y if self.gradient_bits == 32 else quantize_gradient(y, self.gradient_bits)


def _weight_quantizer(name: str, group: int, options: Mapping[str, Any]) -> WeightQuantizer:
    kind = _kind("weight", quantizers.weights(), name, options)
    if "group" in signature(kind).parameters:
        return kind(group=group, **options)
    if group != 1:
        raise ValueError(f"group = {group}: weight '{name}' has no scale per filter to share, use group=1")
    return kind(**options)


def activation_quantizer(name: str, options: Mapping[str, Any]) -> ActivationQuantizer:
    return _kind("activation", quantizers.activations(), name, options)(**options)


def _kind(operand: str, known: dict[str, Kind], name: str, options: Mapping[str, Any]) -> Kind:
    """The quantiser called ``name``, which has every one of ``options``."""
    if name not in known:
        raise ValueError(f"there is no {operand} quantiser '{name}': choose one of {', '.join(known)}")
    parameters = signature(known[name]).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "group"]
    for option in options:
        if option not in accepted:
            instead = f"choose from {', '.join(accepted)}" if accepted else "it has none, leave it out"
            raise ValueError(f"{operand} '{name}' has no option '{option}': {instead}")
    return known[name]


def _checked_input_scale(input_scale: bool, activation: str) -> bool:
    if input_scale and activation not in ("xnor", "bnn"):
        raise ValueError(f"input_scale is the scale of signs, and activation is '{activation}': use 'xnor' or 'bnn'")
    return input_scale


def pad(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Zeros around [N, C, H, W]; ``pads`` is (top, left, bottom, right), ONNX's order."""
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom)) if any(pads) else x


def unfold(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Every window as channels, tap by tap: [N, C, H, W] -> [N, T C, OH, OW], channel t C + c, t = row KW + column.

    Slices and one concatenation, so that it is those in ONNX too (torch.nn.functional.unfold is neither).
    """
    height, width = (
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    taps = []
    for row in range(0, kernel[0] * dilation[0], dilation[0]):
        for column in range(0, kernel[1] * dilation[1], dilation[1]):
            rows = slice(row, row + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(column, column + (width - 1) * stride[1] + 1, stride[1])
            taps.append(x[:, :, rows, columns])
    return torch.cat(taps, 1)


def taps_first(weight: Tensor) -> Tensor:
    """A convolution's weight in the order of `unfold`: [O, C, KH, KW] -> [O, T C, 1, 1]."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)


def window_mean(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """K = A * (1 / (k_h k_w)), A = mean_c |x| (XNOR-Net eq 11): [N, C, H, W] -> [N, 1, OH, OW].

    Raises:
        ValueError: a dilated window, which torch's average pooling lacks.
    """
    if tuple(dilation) != (1, 1):
        raise ValueError("input_scale with dilation is not supported: use dilation 1, or input_scale=False")
    return F.avg_pool2d(pad(x.abs().mean(1, keepdim=True), pads), kernel, stride)


def constrain_(model: nn.Module) -> None:
    """Apply every weight quantiser's constraint to its latent weight; call it after each optimiser step."""
    for layer in _quantized(model):
        layer.weight_quantizer.constrain_(layer.weight)


def penalty(model: nn.Module) -> Tensor | int:
    """What the weight quantisers of ``model`` add to the loss; 0 where none does."""
    penalties = (layer.weight_quantizer.penalty(layer.weight) for layer in _quantized(model))
    return sum(found for found in penalties if found is not None)


def _quantized(model: nn.Module) -> list[QuantConv2d | QuantLinear]:
    return [layer for layer in model.modules() if isinstance(layer, QuantConv2d | QuantLinear)]
