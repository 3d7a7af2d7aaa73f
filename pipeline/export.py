"""Torch -> ONNX: the deployed network, weights packed 1 bit each, our operators with their bodies."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from torch import nn

from pipeline.deploy import deploy
from tvm_ops import opset


def export(model: nn.Module, input_shape: tuple[int, ...], path: Path) -> nn.Module:
    """Write ``model`` to ``path`` with a dynamic batch, and return the deployed network that it equals.

    input_shape: one example, [C, H, W] or [C]. The file has input ``x`` and output ``y``.
    """
    deployed = deploy(model)
    example = torch.zeros(2, *input_shape)  # a batch of 1 would be taken for a constant
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which we do not use
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployed,
            (example,),
            dynamo=True,
            opset_version=opset.OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["x"],
            output_names=["y"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model_ir = program.model
    opset.attach(model_ir)
    model_ir.ir_version = opset.IR_VERSION
    model_ir.producer_name, model_ir.producer_version = "crossbit", None
    ir.passes.common.ClearMetadataAndDocStringPass()(model_ir)
    for value in (*model_ir.graph.inputs, *model_ir.graph.initializers.values()):
        value.metadata_props.clear()
    proto = ir.to_proto(model_ir)
    onnx.checker.check_model(proto, full_check=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(proto.SerializeToString())
    os.replace(partial, path)
    return deployed
