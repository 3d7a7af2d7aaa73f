"""The methods by name: this folder is the registry, a file without a leading underscore is a member.

A member is one paper's method. It defines ``WEIGHT`` (a `WeightQuantizer`), ``ACTIVATION`` (an `ActivationQuantizer`)
or both, each of which a layer may take by the member's name, and ``METHOD``, the pair that the paper proposes.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tvm_ops.bitplanes import BINARY, Code


@dataclass(frozen=True)
class Method:
    """A published method, for tables: see ``crossbit methods``.

    Attributes:
        title: as papers print it.
        weight, activation: the names of its quantisers.
        weight_levels, activation_levels: the values that they take.
        weight_bits, activation_bits: of a stored code; 32 for real numbers.
        operations: what a multiply-accumulate becomes.
        formula: of what the method quantises.
        source: the paper.
    """

    title: str
    weight: str
    activation: str
    weight_levels: str
    activation_levels: str
    weight_bits: int
    activation_bits: int
    operations: str
    formula: str
    source: str

    @property
    def bits(self) -> str:
        """Of weights and activations: '1w1a'."""
        return f"{self.weight_bits}w{self.activation_bits}a"


@dataclass(frozen=True)
class CodedWeight:
    """A weight as it is deployed: integer codes, and one scale per group of neighbouring filters.

    codes: float32 values of ``code``, the shape of the weight. scale: float32 [ceil(filters / group)].
    negative: the scale of codes below zero where that is another (TTQ), like ``scale``.
    """

    codes: Tensor
    scale: Tensor
    group: int
    code: Code = BINARY
    negative: Tensor | None = None

    def per_filter(self, scale: Tensor | None = None) -> Tensor:
        """The scale (default: of this weight) of every filter, float32 [filters]."""
        return (self.scale if scale is None else scale).repeat_interleave(self.group)[: self.codes.shape[0]]

    def dequantize(self) -> Tensor:
        """scale * codes, float32, the shape of the weight."""
        column = (-1, *[1] * (self.codes.dim() - 1))
        positive = self.codes * self.per_filter().view(column)
        if self.negative is None:
            return positive
        return torch.where(self.codes < 0, self.codes * self.per_filter(self.negative).view(column), positive)


class WeightQuantizer(nn.Module):
    """forward: latent weight -> quantised weight of the same shape, differentiable (straight-through)."""

    def encode(self, weight: Tensor) -> CodedWeight:
        """The deployed form of ``weight``: ``encode(w).dequantize()`` equals ``forward(w)`` in evaluation mode."""
        raise NotImplementedError

    def constrain_(self, weight: Tensor) -> None:
        """What the method does to the latent weight in place after every optimiser step. Default: nothing."""

    def penalty(self, weight: Tensor) -> Tensor | None:
        """What the method adds to the loss, a scalar; None: nothing."""
        return None


class ActivationQuantizer(nn.Module):
    """forward: real activations -> ``scale`` * codes, the same shape, differentiable (straight-through).

    Attributes:
        code: the integers that are deployed; None: activations stay real.
        scale: what a code's unit is worth.
        operator: the operator of our ONNX domain that makes the codes.
    """

    code: Code | None = BINARY
    scale: float = 1.0
    operator: ClassVar[str] = "BinarySign"

    def operands(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        """What ``operator`` takes beside x: constants and attributes."""
        return (), {}

    def codes(self, x: Tensor) -> Tensor:
        """float32 integers of ``code``, as ``operator`` makes them, NaNs included; default: signs."""
        return sign(x)


class ResidualQuantizer(ActivationQuantizer):
    """forward: x -> sum_j b_j H_j, with R_1 = x and for j = 1, 2, ...

        H_j = sign(R_j),  b_j = mean |R_j|,  R_{j+1} = R_j - b_j H_j;    dC/dx = g 1{|x| <= 1}

    The gradient is straight-through on the sum: the scales are constants to it (papers' section 3.2).

    Attributes:
        order: how many planes.
        per_window: whether a layer quantises every receptive field on its own, unfolded to channels.
    """

    order: int
    per_window: bool

    def magnitude(self, x: Tensor) -> Tensor:
        """The mean of |x| that becomes a plane's scale, broadcast over x."""
        raise NotImplementedError

    def planes(self, x: Tensor, sign: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """[(H_j, b_j)], H_j in the shape of x and b_j broadcast over it; ``sign`` makes +-1 codes."""
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.order):
            x = x - found[-1][1] * found[-1][0] if found else x
            found.append((sign(x), self.magnitude(x)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (scale * codes for codes, scale in self.planes(x.detach(), sign))
        return straight_through(x, sum(others, first), x.abs() <= 1)


def sign(x: Tensor) -> Tensor:
    """+-1 with sign(0) = +1, so that one bit stores it; a NaN is -1 (no comparison with it holds)."""
    return torch.where(x >= 0, 1.0, -1.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        return g if gate is None else g * gate, None, None


def straight_through(x: Tensor, value: Tensor, gate: Tensor | None = None) -> Tensor:
    """``value``, to the bit; its gradient goes to x, times ``gate`` where one is given."""
    return _StraightThrough.apply(x, value, gate)


def sum_groups(per_filter: Tensor, group: int) -> Tensor:
    """Sums of ``group`` neighbouring entries of a vector; the last group may be smaller. [O] -> [ceil(O / group)]."""
    missing = -len(per_filter) % group
    return torch.nn.functional.pad(per_filter, (0, missing)).view(-1, group).sum(1)


def checked_group(group: int) -> int:
    """``group``, the number of filters that share a scale.

    Raises:
        ValueError: it is below 1.
    """
    if group < 1:
        raise ValueError(f"group = {group}: a scale is shared by at least one filter, give 1 or more")
    return group


def checked_integer(name: str, value: int, most: int = 8) -> int:
    """``value``, an option called ``name``.

    Raises:
        ValueError: it is no integer from 1 to ``most``.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} = {value!r}: give an integer from 1 to {most}")
    return value


def names() -> list[str]:
    """Every member of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _member(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


def _with(attribute: str) -> dict[str, type]:
    return {name: found for name in names() if (found := getattr(_member(name), attribute, None)) is not None}


def weights() -> dict[str, type[WeightQuantizer]]:
    """The weight quantisers by name."""
    return _with("WEIGHT")


def activations() -> dict[str, type[ActivationQuantizer]]:
    """The activation quantisers by name."""
    return _with("ACTIVATION")


def methods() -> dict[str, Method]:
    """The published methods by name."""
    return {name: _member(name).METHOD for name in names() if hasattr(_member(name), "METHOD")}
