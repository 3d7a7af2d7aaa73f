"""What an app pays for a network, three ways: TVM's runtime, a C library by LLVM, C source by the C compiler.

Bytes of the library, of its constants and of its workspace; what the linker must find; and on this machine the time of
a call from C or C++, of the whole process for one call, and its peak memory, next to ONNX Runtime in one run.
`kernels20` is twenty products of 4x4 matrices: what is left of its time when the kernels are gone is the overhead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track
from rich.table import Table

import targets
from pipeline import models, session, toolchain
from pipeline.artifact import Manifest
from pipeline.export import export
from pipeline.packaging import compile_network, onnxruntime
from pipeline.timer import timer
from targets import Target, cpu_name

HERE = Path(__file__).parent
ROUTES = ("vm", "c-lib", "c-source")
OTHERS = ("cortex-a53", "cortex-a72", "cortex-a7", "cortex-m4", "cortex-m7", "cortex-m55", "wasm32")
MICROCONTROLLER_BYTES = 1 << 18  # networks with more constants are not compiled for Cortex-M


@dataclass(frozen=True)
class Row:
    """One network, one way, one target. us, start_ms and peak_rss_bytes are of this machine only."""

    route: str
    model: str
    target: str
    library_bytes: int
    packed_weight_bytes: int
    workspace_bytes: int | None
    undefined_symbols: list[str]
    us: float | None = None
    start_ms: float | None = None
    peak_rss_bytes: int | None = None


def kernels20(path: Path) -> None:
    """Twenty 4x4 products, one after the other."""
    rng = np.random.default_rng(0)
    matrices = [numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32) / 2, f"w{i}") for i in range(20)]
    names = ["x", *(f"t{i}" for i in range(19)), "y"]
    nodes = [helper.make_node("Gemm", [names[i], f"w{i}"], [names[i + 1]]) for i in range(20)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "kernels20", ends[:1], ends[1:], matrices)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)


def trained(name: str, shape: tuple[int, int, int], classes: int, path: Path, **options: object) -> None:
    """A cross-filter binary network whose norms have seen a batch."""
    torch.manual_seed(0)
    model = models.build(name, shape, classes, models.Quantize(group=16), **options).train()  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.randn(4, *shape))
    export(model.eval(), shape, path)


def networks(folder: Path, quick: bool) -> dict[str, Path]:
    """ONNX files by name."""
    found = {name: folder / f"{name}.onnx" for name in ("kernels20", "digits", "vgg7", "resnet18")[: 2 if quick else 4]}
    kernels20(found["kernels20"])
    trained("vgg_small", (1, 8, 8), 10, found["digits"], widths=(64, 64, 128), pool_after=(1, 2))
    if not quick:
        trained("vgg7", (3, 32, 32), 10, found["vgg7"])
        trained("resnet18", (3, 224, 224), 1000, found["resnet18"], stem="imagenet")
    return found


def undefined(library: Path, target: Target) -> list[str]:
    """What a library or an object needs of others; weak symbols, which may be missing, are none."""
    if library.suffix == ".wasm":
        module = f"new WebAssembly.Module(fs.readFileSync('{library}'))"
        code = f"console.log(JSON.stringify(WebAssembly.Module.imports({module})))"
        said = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout
        return sorted(f"{i['module']}.{i['name']}" for i in json.loads(said))
    nm = f"{target.gnu_triple}-nm" if shutil.which(f"{target.gnu_triple}-nm") else "nm"
    dynamic = ["-D"] if library.suffix == ".so" else []
    said = subprocess.run([nm, *dynamic, "-u", str(library)], capture_output=True, text=True, check=True).stdout
    return sorted(line.split()[-1].split("@")[0] for line in said.splitlines() if line.split()[:1] == ["U"])


def built(folder: Path, made: Manifest, target: Target) -> tuple[Path, int]:
    """The file that is linked or loaded, compiled first if it is source, and its bytes."""
    if made.emit != "c-source":
        path = folder / made.library
        return path, path.stat().st_size
    tools, source = toolchain.find(target), folder / made.library
    if target.tvm_runtime:
        path = source.with_suffix(".so")
        small = ("-s", "-Wl,-z,max-page-size=4096")
        tools.run(*tools.cc, "-O3", "-shared", "-fPIC", *small, "-o", str(path), str(source), "-lm")
        return path, path.stat().st_size
    if not target.gnu_triple:
        path, export = source.with_suffix(".wasm"), f"-Wl,--export={source.stem}_run_with"
        tools.run(*tools.cc, "-O3", "-s", "-mexec-model=reactor", export, "-o", str(path), str(source))
        return path, path.stat().st_size
    path = source.with_suffix(".o")
    tools.run(*tools.cc, "-O2", "-c", "-o", str(path), str(source))
    sizes = subprocess.run([f"{target.gnu_triple}-size", str(path)], capture_output=True, text=True, check=True).stdout
    text, data, *_ = sizes.splitlines()[1].split()
    return path, int(text) + int(data)


def driver(folder: Path, made: Manifest, target: Target) -> list[str]:
    """A program that calls the network, and its arguments after the numbers of rounds and calls."""
    program, tools = folder / "time", toolchain.find(target)
    if made.c_library is None:
        wheels = [Path(str(find_spec(name).submodule_search_locations[0])) for name in ("tvm", "tvm_ffi")]  # type: ignore
        include = [f"-I{wheels[1]}/include"]
        libraries = [f"-Wl,--no-as-needed,-rpath,{w}/lib" for w in wheels] + [f"-L{w}/lib" for w in wheels]
        source = [str(HERE / "time_vm.cc"), *include, *libraries, "-ltvm_runtime", "-ltvm_ffi"]
        tools.run("g++", "-std=c++17", "-O2", "-o", str(program), *source)
        return [str(program), str(folder / made.library), *map(str, made.inputs[0].shape)]
    name = made.c_library.name
    sizes = [int(np.prod(t.shape)) for t in (made.inputs[0], made.outputs[0])]
    defines = [f'-DHEADER="{name}.h"', f"-DNAME={name}", f"-DIN={sizes[0]}", f"-DOUT={sizes[1]}"]
    defines.append(f"-DWORKSPACE={made.c_library.workspace_bytes}")
    library = str(folder / (f"lib{name}.a" if made.emit == "c-lib" else f"{name}.c"))
    code = ["-O3", f"-I{folder}", *defines, "-o", str(program), str(HERE / "time_library.c"), library, "-lm"]
    tools.run(*tools.cc, *code)
    return [str(program)]


def run(command: list[str], rounds: int, calls: int) -> float:
    """What a driver prints: microseconds of a call, or with no rounds its peak resident bytes."""
    arguments = [command[0], str(rounds), str(calls), *command[1:]]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


def runtime_bytes() -> dict[str, int]:
    """The libraries that TVM's route needs beside the network."""
    return {
        f"lib{name}.so": (Path(str(find_spec(wheel).submodule_search_locations[0])) / f"lib/lib{name}.so")
        .stat()
        .st_size  # type: ignore
        for wheel, name in (("tvm", "tvm_runtime"), ("tvm_ffi", "tvm_ffi"))
    }


def main(
    quick: Annotated[bool, typer.Option(help="Two small networks, fewer rounds.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Compile, check, time."""
    console, host = Console(), targets.host()
    rounds, rows, peers = (21 if quick else 51), [], {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for model, path in networks(root, quick).items():
            drivers = {}
            jobs = [(route, t) for t in (host.name, *OTHERS) for route in ROUTES]
            constants = 0
            for route, target_name in track(jobs, description=model, console=Console(stderr=True)):
                target = targets.load(target_name)
                if not target.tvm_runtime and (route != "c-source" or constants > MICROCONTROLLER_BYTES):
                    continue
                folder = root / f"{model}-{route}-{target_name}"
                made = compile_network(path, folder, target, threads=1, emit=route, name=model)  # type: ignore[arg-type]
                library, size = built(folder, made, target)
                workspace = made.c_library.workspace_bytes if made.c_library else None
                constants = made.c_library.constant_bytes if made.c_library else constants
                rows.append(Row(route, model, target_name, size, constants, workspace, undefined(library, target)))
                if target is host:
                    verdict = session.verify(folder)
                    if not verdict.passed:
                        raise ValueError(f"{folder.name}: differs from ONNX Runtime by {verdict.error:.3g}: not timed")
                    drivers[len(rows) - 1] = driver(folder, made, target)
            runtime = onnxruntime(path, 1)
            shape = [d if isinstance(d, int) else 1 for d in runtime.get_inputs()[0].shape]
            feed = {runtime.get_inputs()[0].name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
            runtime.run(None, feed)
            seconds = timer(partial(runtime.run, None, feed))
            times: dict[int, list[float]] = {i: [] for i in drivers}
            peer: list[float] = []
            for _ in range(5):  # in turns, so that whatever else the machine does meets all of them
                for i, command in drivers.items():
                    times[i].append(run(command, rounds, max(1, int(2000 / run(command, 3, 1)))))
                peer.append(seconds(500 if model in ("kernels20", "digits") else 3) * 1e6)
            peers[model] = float(np.median(peer))
            for i, command in drivers.items():
                starts = []
                for _ in range(10):
                    start = time.perf_counter()
                    peak = int(run(command, 0, 1))
                    starts.append(time.perf_counter() - start)
                us = float(np.median(times[i]))
                rows[i] = replace(rows[i], us=us, start_ms=min(starts) * 1e3, peak_rss_bytes=peak)
            vm = [i for i, row in enumerate(rows) if (row.model, row.route) == (model, "vm")]
            for i in vm:
                rows[i] = replace(rows[i], packed_weight_bytes=constants)
    show(console, rows, peers)
    if json_ is not None:
        json_.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def show(console: Console, rows: list[Row], peers: dict[str, float]) -> None:
    """The tables of docs/apps.md."""

    def number(value: float | None, form: str = ",") -> str:
        return "" if value is None else f"{value:{form}}"

    console.print(f"{cpu_name()}, 1 thread, {time.strftime('%Y-%m-%d')}; other targets: compiled, not timed")
    console.print("beside a vm library: " + ", ".join(f"{k} {v:,} bytes" for k, v in runtime_bytes().items()))
    columns = (
        "model",
        "target",
        "route",
        "library",
        "constants",
        "workspace",
        "us",
        "start ms",
        "peak RSS",
        "undefined",
    )
    table = Table(*columns, box=None)
    for r in rows:
        numbers = [number(v) for v in (r.library_bytes, r.packed_weight_bytes, r.workspace_bytes)]
        times = [number(r.us, ",.2f"), number(r.start_ms, ".2f"), number(r.peak_rss_bytes)]
        table.add_row(r.model, r.target, r.route, *numbers, *times, " ".join(r.undefined_symbols))
    console.print(table)
    for model, us in peers.items():
        console.print(f"ONNX Runtime, {model}, the same file, from Python: {us:,.1f} us")


if __name__ == "__main__":
    sys.exit(typer.run(main))
