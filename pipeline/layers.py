"""Quantised layers: a torch layer, a weight quantiser and an activation quantiser, each by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import quantizers
from pipeline.quantizers import ActivationQuantizer, WeightQuantizer
from pipeline.quantizers.bwn import Gradient


def _weight_quantizer(name: str, group: int, gradient: Gradient) -> WeightQuantizer:
    kind = quantizers.load(name)
    if not issubclass(kind, WeightQuantizer):
        raise ValueError(f"'{name}' quantises activations, not weights: see `crossbit methods`")
    return kind(group=group, gradient=gradient)


def _activation_quantizer(name: str) -> ActivationQuantizer:
    kind = quantizers.load(name)
    if not issubclass(kind, ActivationQuantizer):
        raise ValueError(f"'{name}' quantises weights, not activations: see `crossbit methods`")
    return kind()


class QuantConv2d(nn.Conv2d):
    """A convolution of quantised activations with quantised weights.

    x: float32 [N, C, H, W] -> float32 [N, O, OH, OW],
        y = scale_g * conv(q(x), signs) [* K] + bias, zero padding of the codes (a padded tap adds nothing).
    With ``input_scale``, K(y, x) = the mean over the window of mean_c |x|, zeros counted (XNOR-Net section 3.2,
    CF section 1.3); published accuracies are reproduced without it.

    Args:
        padding: zeros on every side, or (top, left, bottom, right).
        weight: name of the weight quantiser.
        activation: name of the activation quantiser.
        group: M, neighbouring filters per scale.
        gradient: the weight quantiser's backward rule.

    Raises:
        ValueError: a quantiser that does not exist, or of the wrong operand.
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
        activation: str = "sign",
        group: int = 1,
        input_scale: bool = False,
        gradient: Gradient = "published",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, bias=bias)
        self.pads = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.input_scale = input_scale
        self.weight_quantizer = _weight_quantizer(weight, group, gradient)
        self.activation_quantizer = _activation_quantizer(activation)

    def forward(self, x: Tensor) -> Tensor:
        codes = pad(self.activation_quantizer(x), self.pads)
        y = F.conv2d(codes, self.weight_quantizer(self.weight), None, self.stride, 0, self.dilation)
        if self.input_scale:
            y = y * window_mean(x, self.kernel_size, self.stride, self.pads, self.dilation)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class QuantLinear(nn.Linear):
    """A dense layer of quantised activations and weights: y = scale_g * (q(x) signs^T) [* mean |x|] + bias.

    x: float32 [N, C] -> float32 [N, O]. Arguments as in `QuantConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        weight: str = "bwn",
        activation: str = "sign",
        group: int = 1,
        input_scale: bool = False,
        gradient: Gradient = "published",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.input_scale = input_scale
        self.weight_quantizer = _weight_quantizer(weight, group, gradient)
        self.activation_quantizer = _activation_quantizer(activation)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.activation_quantizer(x), self.weight_quantizer(self.weight))
        if self.input_scale:
            y = y * x.abs().mean(1, keepdim=True)
        return y if self.bias is None else y + self.bias


def pad(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Zeros around [N, C, H, W]; ``pads`` is (top, left, bottom, right), ONNX's order."""
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom)) if any(pads) else x


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
    for layer in model.modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
            layer.weight_quantizer.constrain_(layer.weight)
