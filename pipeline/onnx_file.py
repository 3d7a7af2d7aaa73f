"""Reading an ONNX file: checked, batch fixed, constants lifted, every shape known."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import onnx_ir.passes.common
from google.protobuf.message import DecodeError

from tvm_ops import opset


def load(path: Path) -> onnx.ModelProto:
    """The ONNX file as it is.

    Raises:
        ValueError: missing file, not ONNX, or an unknown version of our domain.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path}: not a valid ONNX model ({str(error).splitlines()[0]})") from error
    version = next((o.version for o in proto.opset_import if o.domain == opset.DOMAIN), opset.VERSION)
    if version != opset.VERSION:
        raise ValueError(f"{path}: {opset.DOMAIN} version {version}; this crossbit reads version {opset.VERSION}")
    return proto


def read(path: Path, batch: int) -> ir.Model:
    """The model of an ONNX file, for ``batch`` examples: our operators kept, other functions inlined.

    Raises:
        ValueError: as `load`, or a shape that stays open.
    """
    proto = load(path)
    proto = onnx.inliner.inline_selected_functions(proto, [(opset.DOMAIN, name) for name in opset.FUNCTIONS], True)
    initializers = {i.name for i in proto.graph.initializer}
    for graph_input in proto.graph.input:
        tensor = graph_input.type.tensor_type
        if graph_input.name in initializers:
            continue
        if tensor.elem_type != onnx.TensorProto.FLOAT:
            raise ValueError(f"{path}: input '{graph_input.name}' is not float32, the one input type supported so far")
        if tensor.shape.dim and not tensor.shape.dim[0].HasField("dim_value"):
            tensor.shape.dim[0].dim_value = batch
        elif not tensor.shape.dim or tensor.shape.dim[0].dim_value != batch:
            fixed = tensor.shape.dim[0].dim_value if tensor.shape.dim else "no dimension"
            raise ValueError(f"{path}: input '{graph_input.name}' has a fixed batch of {fixed}, asked for {batch}")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir.passes.common.RemoveInitializersFromInputsPass()(model)
    for value in model.graph.inputs:
        shape(value)
    return model


def shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a tensor whose dimensions are all known.

    Raises:
        ValueError: one is not.
    """
    if value.shape is None or not all(isinstance(s, int) for s in value.shape):
        raise ValueError(f"'{value.name}' has the open shape {value.shape}: export with fixed height and width")
    return tuple(int(s) for s in value.shape)
