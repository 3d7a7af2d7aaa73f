"""Cross-filter compression of what is trained already (CF section 4.4): the bits stay, neighbours share a scale.

A filter-wise binary network needs no float parent: its scales become the means over M neighbours (eq 14-16), in the
ONNX file as well as in the checkpoint, and both ways give the same network. A float network is first taken as the
filter-wise network of its weights. ``crossbit train --start`` fine-tunes a converted checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.similarity import LayerScales

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from pipeline.train import Trained


class _Stored(NamedTuple):
    """A layer in an ONNX file: its scales' tensor and the GroupScale nodes that read it."""

    layer: LayerScales
    nodes: list[onnx.NodeProto]
    scale: onnx.TensorProto


_NOT_FLOAT = "--activation {}: {} is quantised already, leave it out; it is for float networks"


def layers(source: Path, activation: str | None = None) -> list[LayerScales]:
    """The filter-wise scales of every binary layer of an ONNX file of ours, or of a checkpoint or its folder.

    Args:
        activation: the activation quantiser that a float network gets; default: its recipe's.

    Raises:
        ValueError: there is none, the file holds shared scales only, or an ``activation`` for a quantised network.
    """
    if source.suffix != ".onnx":
        return _of_model(_filterwise(source, activation).model, source)
    if activation is not None:
        raise ValueError(_NOT_FLOAT.format(activation, source))
    return [stored.layer for stored in _stored(source)[1]]


def convert(source: Path, out: Path, groups: Mapping[str, int], activation: str | None = None) -> None:
    """Write the network with M of every layer as in ``groups``, by the names of `layers`: a file, or a run's folder.

    Raises:
        ValueError: ``out`` exists, or as `layers`.
    """
    if out.exists():
        raise ValueError(f"{out} exists: give another place for the converted network")
    if source.suffix == ".onnx":
        _convert_onnx(source, out, groups)
    else:
        _convert_run(source, out, groups, activation)


# ONNX files ------------------------------------------------------------------------------------------------------


def _stored(path: Path) -> tuple[onnx.ModelProto, list[_Stored]]:
    """The file, and its layers with one scale per filter.

    The exporter names a layer's tensors NAME.weight.words [planes, O, T, ceil(C / 8)] and NAME.weight.scale [O]; the
    scales include what an activation code's unit is worth (1 for signs), which shares and prices in per cent ignore.
    """
    from onnx import numpy_helper

    from pipeline import onnx_file
    from tvm_ops import opset

    proto = onnx_file.load(path)
    tensors = {t.name: t for t in proto.graph.initializer}
    ours = [node for node in proto.graph.node if node.domain == opset.DOMAIN]
    channels = {n.input[0]: _attributes(n)["channels"] for n in ours if n.op_type == "UnpackCodes"}
    found = []
    for name in dict.fromkeys(node.input[0] for node in ours if node.op_type == "GroupScale"):
        layer = name.removesuffix(".weight.scale")
        words, scale = tensors.get(f"{layer}.weight.words"), tensors.get(name)
        if words is None or scale is None or words.dims[0] != 1:
            continue  # weights of several planes are not +-1, stacked ones have no words of their own
        nodes = [node for node in ours if node.op_type == "GroupScale" and node.input[0] == name]
        if (group := _attributes(nodes[0])["group"]) != 1:
            raise ValueError(
                f"{path}: layer '{layer}' has one scale for {group} filters and not those of each: "
                "give a file with M = 1, or the checkpoint"
            )
        values = numpy_helper.to_array(scale).astype(np.float64)
        found.append(_Stored(LayerScales(layer, channels[words.name] * words.dims[2], values), nodes, scale))
    if not found:
        raise ValueError(f"{path}: has no layer of +-1 weights with one scale per filter, and nothing else can share")
    return proto, found


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    """The integers among a node's attributes."""
    return {attribute.name: attribute.i for attribute in node.attribute}


def _convert_onnx(source: Path, out: Path, groups: Mapping[str, int]) -> None:
    import onnx
    from onnx import numpy_helper

    proto, found = _stored(source)
    for layer, nodes, scale in found:
        group = groups[layer.name]
        scale.CopyFrom(numpy_helper.from_array(layer.shared(group).astype(np.float32), scale.name))
        for typed in proto.graph.value_info:
            if typed.name == scale.name:
                typed.type.tensor_type.shape.dim[0].dim_value = scale.dims[0]
        for node in nodes:
            next(a for a in node.attribute if a.name == "group").i = group
    onnx.checker.check_model(proto, full_check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(proto.SerializeToString())
    os.replace(partial, out)


# Checkpoints -----------------------------------------------------------------------------------------------------


def _filterwise(source: Path, activation: str | None) -> Trained:
    """A run's network with M = 1 in every layer; of a float run, the binary network of its weights."""
    from pipeline import train

    trained = train.load(source)
    tables = trained.recipe.model_dump(mode="json")
    if trained.recipe.model.quantize and activation is not None:
        raise ValueError(_NOT_FLOAT.format(activation, source))
    tables["model"]["quantize"] = True
    tables["quantize"] |= {"group": 1} | ({} if activation is None else {"activation": activation})
    return _rebuilt(trained, tables | {"groups": {}}, source)


def _rebuilt(trained: Trained, tables: dict[str, Any], source: Path) -> Trained:
    """The network of another recipe, with the weights of ``trained``."""
    from pipeline import recipe as recipes

    recipe = recipes.parse(tables, str(source))
    model = recipe.build(trained.image_shape, len(trained.classes))
    state = trained.model.state_dict()
    if trained.recipe.model.quantize != recipe.model.quantize:
        state = _by_order(state, model, source)
    model.load_state_dict(state)
    return trained._replace(model=model.eval(), recipe=recipe, history=())


def _by_order(state: Mapping[str, Tensor], model: nn.Module, source: Path) -> dict[str, Tensor]:
    """A float network's tensors under the names of its quantised twin, whose quantisers keep their own."""
    wanted = model.state_dict()
    own = {name: tensor for name, tensor in wanted.items() if "_quantizer." in name}
    names = [name for name in wanted if name not in own]
    if [t.shape for t in state.values()] != [wanted[name].shape for name in names]:
        raise ValueError(
            f"{source}: the float network's tensors are not, one by one, those of its quantised twin: "
            "train the quantised network instead"
        )
    return own | dict(zip(names, state.values(), strict=True))


def _of_model(model: nn.Module, source: Path) -> list[LayerScales]:
    from pipeline.layers import QuantConv2d, QuantLinear
    from tvm_ops.bitplanes import BINARY

    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantConv2d | QuantLinear):
            continue
        coded = layer.weight_quantizer.encode(layer.weight)
        if coded.code == BINARY and coded.negative is None and len(coded.scale) == len(coded.codes):
            found.append(LayerScales(name, coded.codes[0].numel(), coded.scale.double().numpy()))
    if not found:
        raise ValueError(
            f"{source}: has no layer of +-1 weights with one scale per filter, as 'bwn' makes them, "
            "and nothing else can share"
        )
    return found


def _convert_run(source: Path, out: Path, groups: Mapping[str, int], activation: str | None) -> None:
    from pipeline import train

    filterwise = _filterwise(source, activation)
    names = [layer.name for layer in _of_model(filterwise.model, source)]
    tables = filterwise.recipe.model_dump(mode="json")
    different = {groups[name] for name in names}
    if len(different) == 1:
        tables["quantize"]["group"] = different.pop()
    else:
        tables["groups"] = {name: groups[name] for name in names}
    train.write(_rebuilt(filterwise, tables, source), out)
