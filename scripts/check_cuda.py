"""What NVIDIA's compiler makes of the kernels of networks, for every GPU that crossbit knows. Needs no GPU.

    .venv/bin/python scripts/check_cuda.py [--quick] [--json FILE]

Every network is compiled for every target and disassembled; on the CPU, an emulator runs it and ONNX Runtime is the
oracle. Exit code 1 where a kernel of bits does without the 1-bit tensor cores that its GPU has, calls an emulation of
them, or where any kernel keeps registers in memory or computes something else. Writes a list of {"network", "arch",
"kernel", "bmma", "calls", "local_accesses", "emulator_equal"}; the last is null where it was not run.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tvm
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from tvm_ffi.libinfo import find_include_path, find_libtvm_ffi

import targets
from pipeline import compiler, cuda_toolchain, importer, models, packaging, toolchain
from pipeline.compiler import CudaBuild
from pipeline.export import export
from pipeline.layers import QuantConv2d
from pipeline.models import Quantize
from pipeline.stacked import StackedConv2d
from targets import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cuda_emulator import emulator

BITS = "bitserial"  # in the names of kernels that multiply bits by bits
WITH_BMMA = range(75, 91)
TWO_BITS = {
    "weight": "dorefa",
    "weight_options": {"bits": 2},
    "activation": "dorefa",
    "activation_options": {"bits": 2},
}


def block(channels: int, size: int, conv: nn.Module | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution between two norms; by default XNOR with one scale for 16 filters."""
    conv = conv or QuantConv2d(channels, channels, 3, padding=1, group=16)
    return nn.Sequential(nn.BatchNorm2d(channels), conv, nn.BatchNorm2d(channels)), (channels, size, size)


def networks(quick: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks by name, each with the shape of an image."""

    def conv(**options: Any) -> nn.Module:
        return QuantConv2d(64, 64, 3, padding=1, **options)

    widths = (32, 64, 64)
    digits: nn.Module = models.build("vgg_small", (1, 8, 8), 10, Quantize(group=16), widths=widths)
    small = {"digits": (digits, (1, 8, 8)), "ternary": block(64, 14, conv(activation="tbn"))}
    if quick:
        return small
    stacked = StackedConv2d(64, 64, 3, padding=1, segments=4, bank=32)
    return small | {
        "2 x 2 bits": block(64, 14, conv(**TWO_BITS)),
        "weights only": block(64, 14, conv(activation="real")),
        "residual planes": block(64, 14, conv(activation="horq")),
        "stacked": block(64, 14, stacked),
        "resnet18 56x56x64": block(64, 56),
        "resnet18 28x28x128": block(128, 28),
        "resnet18 14x14x256": block(256, 14),
        "resnet18 7x7x512": block(512, 7),
    }


def emulated(built: CudaBuild, model: Path, target: Target, folder: Path) -> bool:
    """Whether the emulated network gives what ONNX Runtime does, by `crossbit verify`'s rule."""
    assert target.gpu is not None
    kernels = emulator.emulate_source(built.source, folder / "emulated.o", shared=False, arch=target.gpu.arch)
    tools = toolchain.find(targets.host())
    library = folder / "emulated.so"

    def link(output: str, objects: list[str], **_: Any) -> None:
        tools.link_shared(output, [*objects, find_libtvm_ffi(), "-lstdc++"])

    link.object_format = "o"  # type: ignore[attr-defined]
    built.executable.export_library(str(library), addons=[str(kernels)], fcompile=link)
    inputs, expected = packaging.golden_pair(model, 1)
    machine = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, inputs.values()))
    results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    limit = packaging.TOLERANCE * max(1.0, *(float(np.abs(e).max()) for e in expected.values()))
    pairs = zip(results, expected.values(), strict=True)
    return all(float(np.abs(r.numpy() - e).max()) <= limit for r, e in pairs)


def rows(name: str, model: Path, chosen: list[Target], nvcc: cuda_toolchain.Nvcc) -> list[dict[str, Any]]:
    """What becomes of one network."""
    found = []
    alike: dict[str, list[tuple[Target, CudaBuild]]] = defaultdict(list)  # targets by the source they get
    for target in chosen:
        built = compiler.build_cuda(compiler.lower(importer.load(model, 1, target)), target)
        alike[built.source].append((target, built))
    for source, group in alike.items():
        target, built = group[0]
        archs = [each.gpu.arch for each, _ in group if each.gpu]
        with tempfile.TemporaryDirectory() as temporary:
            kernels = Path(temporary) / "kernels.o"
            nvcc.compile(source, kernels, archs, f"-I{find_include_path()}")
            equal = emulated(built, model, target, Path(temporary))
            for (arch, kernel), code in sorted(nvcc.machine_code(kernels).items()):
                count = {name: len(re.findall(rf"\s{name}\b", code)) for name in ("BMMA", "CALL", "LDL", "STL")}
                found.append(
                    {
                        "network": name,
                        "arch": arch,
                        "kernel": kernel,
                        "bmma": count["BMMA"],
                        "calls": count["CALL"],
                        "local_accesses": count["LDL"] + count["STL"],
                        "emulator_equal": equal if arch == archs[0] else None,
                    }
                )
    return found


def wrong(row: dict[str, Any]) -> list[str]:
    """What is the matter with a row."""
    bits = BITS in row["kernel"]
    capable = int(row["arch"].removeprefix("sm_")) in WITH_BMMA
    reasons = {
        "no BMMA": bits and capable and not row["bmma"],
        "calls": bits and row["calls"],  # elsewhere a division is a call
        "local memory": row["local_accesses"],
        "not equal": row["emulator_equal"] is False,
    }
    return [reason for reason, holds in reasons.items() if holds]


def main(
    quick: Annotated[bool, typer.Option(help="Two small networks on three GPUs.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the list there.")] = None,
) -> None:
    """Compile, disassemble, emulate."""
    console = Console()
    try:
        nvcc = cuda_toolchain.find(targets.load("cuda-sm80"))
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    gpus = ["cuda-sm75", "cuda-sm80", "cuda-sm100"] if quick else [n for n in targets.names() if n.startswith("cuda-")]
    chosen = [targets.load(name) for name in gpus]
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (network, shape) in networks(quick).items():
            model = Path(temporary) / "model.onnx"
            with torch.no_grad():  # norms that have seen a batch
                network.train()(torch.randn(4, *shape))
            export(network.eval(), shape, model)
            found += rows(name, model, chosen, nvcc)
            console.print(f"{name}: {sum(row['network'] == name for row in found)} kernels", highlight=False)
    table = Table("network", "GPU", "kernel", "BMMA", "calls", "local", "emulated", "wrong")
    for row in found:
        if BITS in row["kernel"] or wrong(row):
            words = {True: "equal", False: "differs", None: "-"}[row["emulator_equal"]]
            counts = (str(row[key]) for key in ("bmma", "calls", "local_accesses"))
            table.add_row(row["network"], row["arch"], row["kernel"], *counts, words, ", ".join(wrong(row)))
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps(found, indent=1) + "\n")
    if any(map(wrong, found)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
