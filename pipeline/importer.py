"""ONNX -> Relax: one function an operator, on what is known of its inputs (`values`).

Float operators become Relax operators on NHWC tensors; the product and the sum of floats are rounded one by one, as
ONNX Runtime does. An operator that is not here is refused by name, with its node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tvm
from onnx.reference import ReferenceEvaluator
from tvm import relax, te, tirx

from pipeline import onnx_file
from pipeline.values import (
    ByteSum,
    Channelwise,
    Codes,
    Constant,
    Emitter,
    FloatSum,
    MaxPool,
    Real,
    RealSum,
    Signs,
    Stacked,
    StackedSum,
    Sum,
    Value,
)
from targets import Target
from tvm_ops import opset
from tvm_ops.bitplanes import BINARY, TERNARY, Code, decode, odd, unpack, unsigned
from tvm_ops.ops import bitweight_conv2d, byte_conv2d, quantize, stacked_conv2d
from tvm_ops.ops.bitserial_conv2d import Geometry, Product
from tvm_ops.output_transform import Step, product

Attributes = dict[str, Any]
Handler = Callable[[Emitter, Sequence[Any], Attributes], Value]


def load(path: Path, batch: int, target: Target) -> tvm.IRModule:
    """The Relax module of an ONNX file for a fixed batch and a target, by which operators choose how weights lie.

    Its function ``main`` has the inputs and outputs of the file.

    Raises:
        ValueError: the file is no ONNX model, or uses what is not supported (the sentence names the node).
    """
    model = onnx_file.read(path, batch)
    graph = model.graph
    emitter = Emitter(relax.BlockBuilder(), target)
    values: dict[str, Value] = {}
    parameters = []
    for graph_input in graph.inputs:
        shape = onnx_file.shape(graph_input)
        variable = relax.Var(str(graph_input.name), relax.TensorType(shape, "float32"))
        parameters.append(variable)
        values[str(graph_input.name)] = Real(emitter, variable, shape)
    for name, initializer in graph.initializers.items():
        assert initializer.const_value is not None
        values[name] = Constant(initializer.const_value.numpy())
    uses = Counter(v.name for node in graph for v in node.inputs if v is not None)
    uses.update(v.name for v in graph.outputs)

    builder = emitter.builder
    with builder.function("main", parameters):
        try:
            with builder.dataflow():
                for graph_input in graph.inputs:
                    values[str(graph_input.name)] = _to_channels_last(values[str(graph_input.name)], emitter)
                for node in graph:
                    inputs = [None if v is None else _shared(values, str(v.name), uses, emitter) for v in node.inputs]
                    values[str(node.outputs[0].name)] = _convert(node, emitter, inputs)
                outputs = [_from_channels_last(values[str(v.name)], emitter) for v in graph.outputs]
                result = builder.emit_output(outputs if len(outputs) > 1 else outputs[0])
        except ValueError:
            builder._end_block()  # TVM leaves it open, and warns of that on the terminal
            raise
        builder.emit_func_output(result)
    return builder.get()


def _shared(values: dict[str, Value], name: str, uses: Counter[str | None], emitter: Emitter) -> Value:
    """A value for one of its readers: with several, its steps are done once, for all of them."""
    value = values[name]
    if uses[name] > 1 and isinstance(value, Channelwise):
        value = values[name] = Real(emitter, value.real(), value.shape)
    return value


def _convert(node: ir.Node, emitter: Emitter, inputs: list[Any]) -> Value:
    name = node.name or node.op_type
    key = node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}"
    if len([o for o in node.outputs if o.name]) != 1:
        raise ValueError(f"node '{name}': {key} with {len(node.outputs)} outputs is not supported")
    attributes = {field: _attribute(value) for field, value in node.attributes.items()}
    known = [i for i in inputs if i is not None]
    try:
        if node.domain == "" and known and all(isinstance(i, Constant) for i in known):
            array = _evaluate(node, inputs)
            return _as_filters(inputs[0].stack, array) if isinstance(inputs[0], Stacked) else Constant(array)
        if key not in OPERATORS:
            raise ValueError(f"operator {key} is not supported; the supported ones are {', '.join(sorted(OPERATORS))}")
        return OPERATORS[key](emitter, inputs, attributes)
    except ValueError as error:
        raise ValueError(f"node '{name}' ({key}): {error}") from error


def _attribute(attribute: ir.Attr) -> Any:
    value = attribute.value
    return value.numpy() if isinstance(value, ir.TensorProtocol) else value


def _evaluate(node: ir.Node, inputs: list[Constant | None]) -> np.ndarray:
    """A standard operator on constants."""
    feeds = {str(v.name): c.array for v, c in zip(node.inputs, inputs, strict=True) if v is not None and c is not None}
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    return np.asarray(ReferenceEvaluator(proto).run(None, feeds)[0])


# Layouts ---------------------------------------------------------------------------------------------------------


def _to_channels_last(value: Value, emitter: Emitter) -> Channelwise:
    expr = value.real()
    if len(value.shape) == 4:
        expr = emitter.op(relax.op.permute_dims(expr, [0, 2, 3, 1]))
    return Channelwise(Real(emitter, expr, value.shape))


def _from_channels_last(value: Value, emitter: Emitter) -> relax.Expr:
    if len(value.shape) == 4:
        return emitter.op(relax.op.permute_dims(value.real(), [0, 3, 1, 2]))
    return value.real()


def _real(emitter: Emitter, expr: relax.Expr, shape: Sequence[int]) -> Channelwise:
    return Channelwise(Real(emitter, emitter.op(expr), tuple(int(s) for s in shape)))


def _axis(axis: int, rank: int) -> int:
    """Where an axis of the file lies in our layout."""
    axis %= rank
    return {0: 0, 1: 3, 2: 1, 3: 2}[axis] if rank == 4 else axis


def _logical_shape(expr: relax.Expr) -> tuple[int, ...]:
    """The file's shape of a tensor in our layout."""
    shape = tuple(int(s) for s in expr.ty.shape.values)
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


# Operators of our domain -----------------------------------------------------------------------------------------


def _as_channelwise(value: Value, emitter: Emitter) -> Channelwise:
    return value if isinstance(value, Channelwise) else Channelwise(Real(emitter, value.real(), value.shape))


def _quantized(e: Emitter, value: Value) -> Channelwise:
    if len(value.shape) not in (2, 4):
        raise ValueError(f"codes of a tensor of rank {len(value.shape)}: flatten it to [N, C] or use [N, C, H, W]")
    return _as_channelwise(value, e)


def _binary_sign(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    return Signs(e, _quantized(e, inputs[0]))


def _ternarize(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    threshold = float(inputs[1].array.item())
    return Codes(e, _quantized(e, inputs[0]), TERNARY, lambda x: quantize.ternary(x, threshold))


def _quantize(code: Callable[[int], Code], pattern: Callable[[Any, int], Any]) -> Handler:
    def convert(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
        bits = int(a["bits"])
        return Codes(e, _quantized(e, inputs[0]), code(bits), lambda x: pattern(x, bits))

    return convert


def _unpack_codes(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    code = Code(tuple(int(r) for r in a["ratios"]), int(a["shift"]))
    values = decode(unpack(inputs[0].array, int(a["channels"])), code)
    return Constant(values.transpose(0, 2, 1).astype(np.float32))


def _stack_filters(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    bank, filters, segments = inputs[0].array, int(a["filters"]), int(a["segments"])
    indices = stacked_conv2d.unpack_indices(inputs[1].array, filters * segments, int(a["bits"]))
    stack = stacked_conv2d.Stack(bank, indices.reshape(filters, segments))
    return Stacked(bank[stack.indices].reshape(filters, -1, bank.shape[2]), stack)


def _group_scale(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    return Constant(np.repeat(inputs[0].array, int(a["group"]))[: int(a["filters"])])


def _accumulator(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    value = inputs[0]
    if not (isinstance(value, Channelwise) and isinstance(value.base, Sum) and not value.steps):
        raise ValueError("it marks the integer sum of codes and coded weights, and its input is none")
    return value


def _as_filters(stack: stacked_conv2d.Stack, array: np.ndarray) -> Stacked:
    """Stacked filters that were reshaped from [O, C, T] to [O, C, KH, KW]."""
    if array.shape[:2] != (len(stack.indices), stack.segments * stack.channels):
        raise ValueError("stacked filters are the weights of a convolution, and nothing else may be made of them")
    return Stacked(array, replace(stack, bank=stack.bank.reshape(*stack.bank.shape[:2], *array.shape[2:])))


# Convolutions and dense layers -----------------------------------------------------------------------------------


def _geometry(image: Sequence[int], kernel: Sequence[int], a: Attributes) -> Geometry:
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or a.get("ceil_mode", 0):
        raise ValueError("auto_pad and ceil_mode are not supported: export with explicit pads")
    pads = [int(p) for p in a.get("pads", (0, 0, 0, 0))]
    strides, dilations = a.get("strides", (1, 1)), a.get("dilations", (1, 1))
    if len(kernel) != 2:
        raise ValueError(f"a window of {len(kernel)} dimensions: only 2-d ones are supported")
    return Geometry(
        (int(image[0]), int(image[1])),
        (int(kernel[0]), int(kernel[1])),
        (int(strides[0]), int(strides[1])),
        (pads[0], pads[1], pads[2], pads[3]),
        (int(dilations[0]), int(dilations[1])),
    )


def _product(e: Emitter, x: Value, weight: Constant, geometry: Geometry, shape: tuple[int, ...]) -> Value:
    """The convolution of x with weights [O, C, KH, KW]."""
    if isinstance(weight, Stacked):
        if not isinstance(x, Codes):
            raise ValueError("stacked filters with real activations are not compiled: quantise the activations")
        return Channelwise(StackedSum(e, x, weight.array.astype(np.int64), BINARY, geometry, shape, weight.stack))
    weights = weight.array
    if isinstance(x, Codes) and (code := bitweight_conv2d.integer_code(weights)) is not None:
        arguments = (e, x, weights.astype(np.int64), code, geometry, shape)
        form = byte_conv2d.form(Product(geometry, x.code, code), len(weights), e.target.byte_product)
        return Channelwise(Sum(*arguments) if form is None else ByteSum(*arguments, form))
    few = bitweight_conv2d.few_bits(weights)
    if few is not None:
        return Channelwise(RealSum(e, x, few, geometry, shape))
    return Channelwise(FloatSum(e, x, weights, geometry, shape))


def _per_channel(value: Value, like: Value) -> np.ndarray | None:
    """A constant that broadcasts along channels only, as float32 [C]; else None."""
    if not isinstance(value, Constant) or value.array.dtype != np.float32:
        return None
    rank, channels = len(like.shape), like.shape[1]
    array = value.array
    if array.ndim > rank:
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if any(extent != 1 for i, extent in enumerate(full.shape) if i != 1) or full.shape[1] not in (1, channels):
        return None
    return np.ascontiguousarray(np.broadcast_to(full.reshape(-1), (channels,)))


def _add_bias(e: Emitter, value: Value, bias: Any) -> Value:
    return value if bias is None else _as_channelwise(value, e).then(Step("add", bias.array.reshape(-1)))


def _conv(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, weight, bias = [*inputs, None][:3]
    if not isinstance(weight, Constant) or len(x.shape) != 4:
        raise ValueError("only 2-d convolutions with constant weights are supported")
    groups = int(a.get("group", 1))
    geometry = _geometry(x.shape[2:], weight.shape[2:], a)
    shape = (x.shape[0], weight.shape[0], *geometry.output)
    if groups == 1:
        return _add_bias(e, _product(e, x, weight, geometry, shape), bias)
    if isinstance(x, Codes):
        raise ValueError(f"a convolution of codes with group = {groups} is not supported: use group = 1")
    conv = relax.op.nn.conv2d(
        x.real(),
        relax.const(np.ascontiguousarray(weight.array.transpose(2, 3, 1, 0))),
        geometry.strides,
        list(geometry.pads),
        geometry.dilations,
        groups,
        "NHWC",
        "HWIO",
        "NHWC",
    )
    return _add_bias(e, _real(e, conv, shape), bias)


def _gemm(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, weight, bias = [*inputs, None][:3]
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
        raise ValueError("alpha, beta and transA are not supported: fold them into the weights")
    if not isinstance(weight, Constant) or len(x.shape) != 2:
        raise ValueError("only matrix products of [N, C] activations with constant weights are supported")
    rows = weight.array if a.get("transB", 0) else weight.array.T
    shape = (x.shape[0], rows.shape[0])
    product = _product(e, x, Constant(rows[:, :, None, None]), Geometry((1, 1), (1, 1)), shape)
    return _add_bias(e, product, bias)


def _batch_norm(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, gamma, beta, mean, variance = inputs
    scale = gamma.array.astype(np.float64) / np.sqrt(variance.array.astype(np.float64) + a.get("epsilon", 1e-5))
    shift = beta.array - mean.array * scale
    return _as_channelwise(x, e).then(Step("mul", scale.astype(np.float32)), Step("add", shift.astype(np.float32)))


# Element-wise operators ------------------------------------------------------------------------------------------


def _binary(onnx_name: str, both: Callable[[Any, Any], Any]) -> Handler:
    """x (op) y: a step where one side is a constant per channel, else a kernel of its own."""
    op = {"Add": "add", "Sub": "add", "Mul": "mul", "Div": "div"}[onnx_name]

    def convert(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
        x, y = inputs
        if onnx_name in ("Add", "Mul") and isinstance(x, Constant):
            x, y = y, x
        constant = None if isinstance(x, Constant) else _per_channel(y, x)
        if constant is not None:
            value = -constant if onnx_name == "Sub" else constant  # x - c and x + (-c) round alike
            return _as_channelwise(x, e).then(Step(op, value))  # type: ignore[arg-type]
        a, b = x.real(), y.real()
        if len(x.shape) != len(y.shape):
            raise ValueError(f"shapes {list(x.shape)} and {list(y.shape)}: only equal ranks are supported")

        def compute(p: Any, q: Any) -> Any:
            extents = [int(max(s, t)) for s, t in zip(p.shape, q.shape, strict=True)]

            def at(tensor: Any, index: Sequence[Any]) -> Any:
                own = zip(tensor.shape, extents, index, strict=True)
                return tensor[tuple(i if int(s) == extent else 0 for s, extent, i in own)]

            return te.compute(extents, lambda *i: both(at(p, i), at(q, i)), name=onnx_name.lower())

        shape = tuple(max(s, t) for s, t in zip(x.shape, y.shape, strict=True))
        return Channelwise(Real(e, e.te(onnx_name.lower(), compute, a, b), shape))

    return convert


def _filled(value: float, channels: int) -> np.ndarray:
    return np.full(channels, value, np.float32)


def _relu(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    return _as_channelwise(inputs[0], e).then(Step("max", _filled(0.0, inputs[0].shape[1])))


def _clip(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    x, low, high = [*inputs, None, None][:3]
    steps: list[Step] = []
    if low is not None:
        steps.append(Step("max", _filled(float(low.array), x.shape[1])))
    if high is not None:
        steps.append(Step("min", _filled(float(high.array), x.shape[1])))
    return _as_channelwise(x, e).then(*steps)


def _unary(function: Callable[[relax.Expr], relax.Expr]) -> Handler:
    def convert(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
        return _real(e, function(inputs[0].real()), inputs[0].shape)

    return convert


def _identity(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    return inputs[0]


# Windows, reductions, shapes -------------------------------------------------------------------------------------


def _max_pool(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x = inputs[0]
    geometry = _geometry(x.shape[2:], a["kernel_shape"], a)
    shape = (*x.shape[:2], *geometry.output)
    if isinstance(x, Codes):  # the maximum of codes is the code of the maximum
        return x.like(Channelwise(MaxPool(e, x.of, geometry, shape)))
    return Channelwise(MaxPool(e, _as_channelwise(x, e), geometry, shape))


def _average_pool(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    g = _geometry(inputs[0].shape[2:], a["kernel_shape"], a)
    if any(g.pads) and not a.get("count_include_pad", 0):
        raise ValueError("padding with count_include_pad = 0 is not supported: use count_include_pad=True")
    pooled = relax.op.nn.avg_pool2d(
        inputs[0].real(), g.kernel, g.strides, list(g.pads), g.dilations, False, True, "NHWC", "NHWC"
    )
    return _real(e, pooled, (*inputs[0].shape[:2], *g.output))


def _pad(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, pads, fill, axes = [*inputs, None, None][:4]
    rank = len(x.shape)
    if a.get("mode", "constant") != "constant" or (pads.array < 0).any():
        raise ValueError("only padding with a constant is supported")
    padded = range(rank) if axes is None else [int(i) % rank for i in axes.array]
    widths = [[0, 0] for _ in range(rank)]
    for axis, width in zip(padded, pads.array.reshape(2, -1).T.tolist(), strict=True):
        widths[axis] = width
    lying = [side for i in ((0, 2, 3, 1) if rank == 4 else range(rank)) for side in widths[i]]
    out = relax.op.nn.pad(x.real(), lying, "constant", 0.0 if fill is None else float(fill.array))
    return _real(e, out, [extent + sum(width) for extent, width in zip(x.shape, widths, strict=True)])


def _global_average_pool(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    mean = relax.op.mean(inputs[0].real(), [1, 2], keepdims=True)
    return _real(e, mean, (*inputs[0].shape[:2], 1, 1))


def _reduce_mean(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x = inputs[0]
    rank = len(x.shape)
    given = inputs[1].array.tolist() if len(inputs) > 1 and inputs[1] is not None else a.get("axes")
    axes = sorted(int(i) % rank for i in (range(rank) if given is None else given))
    keep = bool(a.get("keepdims", 1))
    if not keep and rank == 4 and axes != [2, 3]:
        raise ValueError(f"the mean over axes {axes} without keepdims is not supported: use keepdims, or axes 2 and 3")
    mean = relax.op.mean(x.real(), [_axis(i, rank) for i in axes], keepdims=keep)
    shape = [1 if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
    return _real(e, mean, shape)


def _reshaped(e: Emitter, x: Value, shape: Sequence[int]) -> Value:
    """The file's element order is NCHW's, so a map is turned back first (free where it is 1x1)."""
    if isinstance(x, Codes):  # moving elements and taking their codes commute
        return x.like(_as_channelwise(_reshaped(e, x.of, shape), e))
    expr = x.real()
    if len(x.shape) == 4 and x.shape[2:] != (1, 1):
        expr = e.op(relax.op.permute_dims(expr, [0, 3, 1, 2]))
    value = _real(e, relax.op.reshape(expr, list(shape)), shape)
    return value if len(shape) != 4 else _to_channels_last(value, e)


def _flatten(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, axis = inputs[0], int(a.get("axis", 1)) % (len(inputs[0].shape) + 1)
    return _reshaped(e, x, (int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:]))))


def _reshape(e: Emitter, inputs: Sequence[Any], _: Attributes) -> Value:
    x, wanted = inputs[0], [int(i) for i in inputs[1].array]
    shape = [x.shape[i] if s == 0 else s for i, s in enumerate(wanted)]
    if -1 in shape:
        shape[shape.index(-1)] = int(np.prod(x.shape)) // -int(np.prod(shape))
    return _reshaped(e, x, shape)


def _concat(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    rank, axis = len(inputs[0].shape), int(a["axis"])
    if rank == 4 and axis % rank == 1 and len({i.shape for i in inputs}) == 1:
        return _interleave(e, inputs)
    out = e.op(relax.op.concat([i.real() for i in inputs], _axis(axis, rank)))
    return Channelwise(Real(e, out, _logical_shape(out)))


def _interleave(e: Emitter, inputs: Sequence[Any]) -> Value:
    """Channels of equal maps behind each other, as one more axis first: a choice between whole vectors is no branch in
    a vector (the windows of a 3x3 HORQ layer at 14x14x256: 1,350 us as a concatenation, 240 so, November 2026)."""
    n, c, h, w = inputs[0].shape

    def compute(*maps: Any) -> Any:
        def chosen(i: Any, y: Any, x: Any, part: Any, k: Any) -> Any:
            value = maps[-1][i, y, x, k]
            for number, tensor in reversed(list(enumerate(maps[:-1]))):
                value = tirx.if_then_else(part == number, tensor[i, y, x, k], value)
            return value

        return te.compute((n, h, w, len(maps), c), chosen, name="interleaved")

    out = e.te("concat", compute, *(i.real() for i in inputs))
    return _real(e, relax.op.reshape(out, (n, h, w, len(inputs) * c)), (n, len(inputs) * c, h, w))


def _slice(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    x, starts, ends, axes, steps = [*inputs, None, None][:5]
    if isinstance(x, Codes):  # taking elements and taking their codes commute
        return x.like(_as_channelwise(_slice(e, [x.of, *inputs[1:]], a), e))
    rank, count = len(x.shape), starts.array.size
    along = list(range(count)) if axes is None else [int(i) % rank for i in axes.array]
    by = [1] * count if steps is None else [int(i) for i in steps.array]
    spans = [
        range(x.shape[axis])[slice(int(start), int(end), step)]
        for axis, start, end, step in zip(along, starts.array, ends.array, by, strict=True)
    ]
    if min(by) < 1 or any(len(span) == 0 for span in spans):
        raise ValueError(f"a slice with steps {by} of an axis, or of nothing, is not supported: use positive steps")
    out = relax.op.strided_slice(
        x.real(), [_axis(i, rank) for i in along], [s.start for s in spans], [s.stop for s in spans], by
    )
    shape = list(x.shape)
    for axis, span in zip(along, spans, strict=True):
        shape[axis] = len(span)
    return _real(e, out, shape)


def _softmax(e: Emitter, inputs: Sequence[Any], a: Attributes) -> Value:
    axis = _axis(int(a.get("axis", -1)), len(inputs[0].shape))
    return _real(e, relax.op.nn.softmax(inputs[0].real(), axis), inputs[0].shape)


OPERATORS: dict[str, Handler] = {
    f"{opset.DOMAIN}::BinarySign": _binary_sign,
    f"{opset.DOMAIN}::Ternarize": _ternarize,
    f"{opset.DOMAIN}::QuantizeUnit": _quantize(unsigned, quantize.unit),
    f"{opset.DOMAIN}::QuantizeSymmetric": _quantize(odd, quantize.symmetric),
    f"{opset.DOMAIN}::UnpackCodes": _unpack_codes,
    f"{opset.DOMAIN}::StackFilters": _stack_filters,
    f"{opset.DOMAIN}::GroupScale": _group_scale,
    f"{opset.DOMAIN}::Accumulator": _accumulator,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _gemm,
    "BatchNormalization": _batch_norm,
    "Add": _binary("Add", lambda a, b: a + b),
    "Sub": _binary("Sub", lambda a, b: a - b),
    "Mul": _binary("Mul", product),
    "Div": _binary("Div", lambda a, b: a / b),
    "Relu": _relu,
    "Clip": _clip,
    "Abs": _unary(relax.op.abs),
    "Sigmoid": _unary(relax.op.sigmoid),
    "Tanh": _unary(relax.op.tanh),
    "Identity": _identity,
    "Dropout": _identity,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Pad": _pad,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Concat": _concat,
    "Slice": _slice,
    "Softmax": _softmax,
}
