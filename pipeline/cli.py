"""The command line: one verb a function, no logic. Imports are inside, so a board loads neither torch nor ONNX."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import targets

if TYPE_CHECKING:
    from pipeline.artifact import Layer
    from pipeline.remote import Board
    from pipeline.session import Session

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
out, err = Console(), Console(stderr=True)

_EXTRAS = {  # what the base install lacks, by the extra of pyproject.toml that brings it
    "compile": ("cloudpickle", "jinja2", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "psutil", "xgboost"),
    "train": ("PIL", "sklearn", "torch"),
    "bench": ("matplotlib",),
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="A name of `crossbit targets`, or 'host'.")]
Threads = Annotated[int, typer.Option(min=1, help="Cores that the library shares its work between.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples per call.")]
Records = Annotated[Path, typer.Option(help="Where tuning records of all targets lie.")]
OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file.")]
Rpc = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Run on a board of this TVM tracker, with --key.")]
Key = Annotated[str | None, typer.Option(help="The key that the board registered with.")]
ArtifactFolder = Annotated[Path, typer.Argument(help="A folder that `crossbit compile` wrote.")]


@app.callback()
def crossbit() -> None:
    """Binary and cross-filter-compressed CNNs, from torch to tuned shared libraries.

    [bold]train[/bold] -> [bold]export[/bold] -> [bold]compile[/bold] -> [bold]verify[/bold] -> [bold]tune[/bold] ->
    [bold]bench[/bold] -> [bold]report[/bold]
    """


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a packaged recipe (digits, cifar10).")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where the checkpoint goes.")],
    data: Annotated[Path | None, typer.Option(help="The data set, for recipes that need one.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override a field: quantize.group=1 (repeatable).")] = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder.")] = False,
    start: Annotated[Path | None, typer.Option(help="Fine-tune this run: its network, the recipe's training.")] = None,
    as_json: Json = False,
) -> None:
    """Train a network.

    Example: crossbit train digits -o runs/m16 --set quantize.group=16
    """
    from pipeline import data as datasets
    from pipeline import recipe as recipes
    from pipeline import train as training

    chosen = recipes.load(recipe)
    chosen = chosen if start is None else training.start_recipe(chosen, start)
    tables = chosen.model_dump()
    for assignment in set_:
        name, equals, value = assignment.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section in tables):
            raise ValueError(f"--set {assignment}: write section.field=value, with a section of {', '.join(tables)}")
        tables[section][field] = _toml_value(value)
    chosen = recipes.parse(tables, f"{recipe} with {' '.join(set_)}") if set_ else chosen
    dataset = datasets.load(chosen.data.name, data)
    result = training.train(chosen, dataset, folder, resume, start)
    summary = {
        "name": folder.name,
        "model": chosen.model.name,
        "method": chosen.label,
        "data": dataset.name,
        "accuracy": result.last,
        "best_accuracy": result.best,
        "seconds": result.seconds,
        "epochs": [dataclasses.asdict(epoch) for epoch in result.history],
    }
    if os.environ.get("RANK", "0") != "0":  # torchrun: process 0 alone writes and prints
        return
    (folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    if as_json:
        _print_json(summary)
    else:
        _say("trained", f"{folder}: test accuracy {result.last:.2%}, {result.seconds:.0f} s")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `crossbit train` wrote.")],
    file: Annotated[Path | None, typer.Option("--output", "-o", help="The ONNX file; default: in the folder.")] = None,
) -> None:
    """Write a trained network as an ONNX file, weights packed 1 bit each.

    Example: crossbit export runs/m16
    """
    from pipeline import export as exporting
    from pipeline import train as training

    trained = training.load(checkpoint)
    path = file or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "model.onnx"
    exporting.export(trained.model, trained.image_shape, path)
    _say("exported", f"{path}: {path.stat().st_size:,} bytes")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX file, or a folder that `crossbit compile` wrote.")],
    as_json: Json = False,
) -> None:
    """Show every layer: method, bits stored, operations, why a layer is float; of an artifact also its memory.

    Example: crossbit inspect runs/m16/model.onnx
    """
    layers: Sequence[Layer]
    sizes: dict[str, int]
    if model.is_dir():
        from pipeline import artifact

        manifest = artifact.read(model)
        layers, sizes = manifest.layers, {"library_bytes": manifest.files[manifest.library].bytes}
        if (library := manifest.c_library) is not None:
            sizes |= {
                "constant_bytes": library.constant_bytes,
                "workspace_bytes": library.workspace_bytes,
                "workspace_bound": library.workspace_bound,
            }
    else:
        from pipeline import inspection

        found = inspection.inspect(model)
        layers, sizes = found.layers, {"file_bytes": found.file_bytes, "float_bytes": found.float_bytes}
    if as_json:
        _print_json({**sizes, "layers": [layer.model_dump() for layer in layers]})
        return
    rows = [
        (
            layer.name,
            layer.operator,
            layer.method,
            f"{layer.bits_per_weight:.2f}",
            f"{layer.stored_bytes:,}",
            _short(layer.binary_macs),
            _short(layer.float_macs),
            layer.why_float,
        )
        for layer in layers
    ]
    columns = ("layer", "operator", "method", "bits", "bytes", "binary MACs", "float MACs", "why float")
    _table(str(model), columns, rows, right=(3, 4, 5, 6))
    if "file_bytes" in sizes:
        ratio = sizes["float_bytes"] / sizes["file_bytes"]
        out.print(
            f"file {sizes['file_bytes']:,} bytes; parameters in float32 {sizes['float_bytes']:,} bytes ({ratio:.1f} x)"
        )
    else:
        code = f" (machine code for {', '.join(manifest.gpus)})" if manifest.gpus else ""
        out.print(f"{manifest.library} for {manifest.target}{code}: {sizes['library_bytes']:,} bytes")
    if "workspace_bytes" in sizes:
        out.print(
            f"constants {sizes['constant_bytes']:,} bytes; workspace {sizes['workspace_bytes']:,} bytes (no plan for "
            f"this order of kernels needs less than {sizes['workspace_bound']:,})"
        )


@app.command("compile")
def compile_(
    model: OnnxFile,
    folder: Annotated[Path, typer.Option("--output", "-o", help="The artifact folder.")],
    target: TargetName = "host",
    threads: Threads = 1,
    batch: Batch = 1,
    records: Annotated[
        Path | None, typer.Option(help="Root of tuning records to use; 'none' for none. Default: crossbit's own.")
    ] = None,
    emit: Annotated[
        Literal["vm", "c-lib", "c-source"],
        typer.Option(help="For TVM's runtime; or a free-standing C library, or C99 source."),
    ] = "vm",
    name: Annotated[str | None, typer.Option(help="Of the C library and its symbols; default: the folder's.")] = None,
) -> None:
    """Compile an ONNX file for a target.

    Example: crossbit compile runs/m16/model.onnx -o runs/m16/tuned --records records

    Example: crossbit compile runs/m16/model.onnx -o runs/m16/c --emit c-lib --name digits
    """
    from pipeline import packaging, tune

    chosen = targets.load(target)
    if records is None:
        own_records = tune.shipped_records(chosen, threads) if emit != "c-source" else None
    else:
        own_records = None if records == Path("none") else tune.records_folder(records, chosen, threads)
    with err.status(f"compiling {model} for {chosen.name}"):
        manifest = packaging.compile_network(model, folder, chosen, threads, batch, own_records, emit, name)
    size = manifest.files[manifest.library].bytes
    gpus = f", machine code for {', '.join(manifest.gpus)}" if manifest.gpus else ""
    memory = f", workspace {manifest.c_library.workspace_bytes:,} bytes" if manifest.c_library else ""
    _say(
        "compiled",
        f"{folder} for {chosen.name}: {manifest.library} {size:,} bytes{memory}, {manifest.kernels} kernels, "
        f"{manifest.tuned_kernels} of them tuned{gpus}",
    )


@app.command()
def tune(
    model: OnnxFile,
    target: TargetName = "host",
    threads: Threads = 1,
    batch: Batch = 1,
    trials: Annotated[int, typer.Option(min=1, help="Candidates per kernel, stored ones included.")] = 64,
    records: Records = Path("records"),
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    rpc: Rpc = None,
    key: Key = None,
    carry: Annotated[
        Path | None, typer.Option(help="A folder of candidates for a GPU that is elsewhere; again: take its results.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search faster schedules for a network's kernels, on this machine or a board. Ctrl-C keeps what was found.

    A Cortex-A53, A72, A76 or A7 that is not here is not timed: cycles are counted by LLVM's model of it.

    For a GPU that is elsewhere, --carry FOLDER builds candidates, FOLDER/run.py measures them there, and the same
    command takes the results.

    Example: crossbit tune runs/m16/model.onnx --trials 32

    Example: crossbit tune runs/m16/model.onnx --target cortex-a72 --rpc 127.0.0.1:9190 --key rpi4
    """
    from pipeline import compiler, importer
    from pipeline import tune as tuning

    chosen = targets.load(target)
    folder = tuning.records_folder(records, chosen, threads)
    lowered, board, waiting = compiler.lower(importer.load(model, batch, chosen)), _board_address(rpc, key), 0

    with _progress("tuning") as advance:

        def on_trial(kernel: str, done: int, total: int) -> None:
            advance(done, total, kernel)

        if carry is None:
            tuned = tuning.tune(lowered, chosen, threads, folder, trials, seed, on_trial, _warn, board)
        elif board is not None:
            raise ValueError("--carry and --rpc are two ways to a machine: give one of them")
        else:
            tuned, waiting = tuning.tune_gpu(lowered, chosen, threads, folder, trials, seed, on_trial, _warn, carry)
    if waiting:
        _warn(
            f"{waiting} candidates in {carry} wait to be measured: `python {carry}/run.py` on a machine with the GPU, "
            "NVIDIA's driver and NumPy, then bring the folder back and run this command again"
        )
    if as_json:
        _print_json([dataclasses.asdict(kernel) for kernel in tuned])
        return
    if waiting and not tuned:
        return
    rows = [
        (k.kernel, f"{k.default:,.1f}", f"{k.best:,.1f}", f"{k.default / k.best:.2f} x", str(k.trials)) for k in tuned
    ]
    unit = tuned[0].unit if tuned else "us"
    note = ": of LLVM's model of the core, not time" if unit == "model cycles" else ""
    columns = ("kernel", f"default {unit}", f"best {unit}", "gain", "trials")
    _table(f"{chosen.name}, {threads} thread(s){note}", columns, rows)
    _say("tuned", f"records in {folder}; use them with `crossbit compile --records {records}`")


@app.command()
def verify(
    folder: ArtifactFolder,
    data: Annotated[
        str | None, typer.Option(help="Also the accuracy on this data set's test half: digits, ...")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Where that data set lies, if it is not packaged.")] = None,
    rpc: Rpc = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check an artifact: every file, the machine, and the golden pair. Exit code 1 where it differs.

    Example: crossbit verify runs/m16/tuned
    """
    from pipeline import session

    with _board(rpc, key) as board:
        loaded = board.open(folder) if board else session.open_session(folder)
        verdict = session.verify(loaded)
        summary: dict[str, Any] = {**dataclasses.asdict(verdict), "passed": verdict.passed}
        if board is not None:
            summary |= {"board": str(board), "emulated": board.emulated}
        if data is not None:
            summary["accuracy"] = _compiled_accuracy(loaded, data, path)
    if data is not None:
        (folder.parent / f"{folder.name}.verify.json").write_text(json.dumps(summary) + "\n")
    if as_json:
        _print_json(summary)
    else:
        word = "verified" if verdict.passed else "differs"
        where = f" on {board}, over RPC{', emulated' if board.emulated else ''}" if board else ""
        accuracy = f", test accuracy {summary['accuracy']:.2%}" if data else ""
        _say(word, f"{folder}{where}: largest error {verdict.error:.3g}, limit {verdict.limit:.3g}{accuracy}")
    if not verdict.passed:
        raise typer.Exit(1)


def _board_address(rpc: str | None, key: str | None) -> tuple[str, str] | None:
    if rpc is not None and key is not None:
        return rpc, key
    if rpc is not None or key is not None:
        raise ValueError("--rpc HOST:PORT (of a tracker) and --key KEY (of a board) go together; give both")
    return None


@contextmanager
def _board(rpc: str | None, key: str | None) -> Iterator[Board | None]:
    """The board of an address, for as long as it is needed: until it is given back, nobody else gets it."""
    from pipeline.remote import Board

    address = _board_address(rpc, key)
    if address is None:
        yield None
        return
    with closing(Board(*address)) as board:
        if board.unknown is not None:
            _warn(board.unknown)
        yield board


def _compiled_accuracy(loaded: Session, name: str, path: Path | None) -> float:
    from pipeline import data as datasets

    test = datasets.load(name, path).test  # type: ignore[arg-type]
    (spec,), (result,) = loaded.manifest.inputs, loaded.manifest.outputs
    images = datasets.to_float(test.images).numpy()
    if spec.shape != (1, *images.shape[1:]):
        raise ValueError(
            f"{loaded.folder}: takes {list(spec.shape)}, and {name} has images of {list(images.shape[1:])}"
        )
    hits = sum(
        int(loaded.run({spec.name: image[None]})[result.name].argmax() == int(label))
        for image, label in zip(images, test.labels, strict=True)
    )
    return hits / len(images)


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(help="Artifact folders.")],
    onnx: Annotated[list[Path], typer.Option(help="ONNX files to time in ONNX Runtime (repeatable).")] = [],  # noqa: B006
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of some 5 ms a subject.")] = 30,
    profile: Annotated[
        bool, typer.Option(help="Also the kernels of the first: time, work, share of the ceiling.")
    ] = False,
    rpc: Rpc = None,
    key: Key = None,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON there.")] = None,
    as_json: Json = False,
) -> None:
    """Time artifacts and ONNX Runtime in one run: checked first, then in turns.

    Example: crossbit bench runs/m16/tuned --onnx runs/float/model.onnx
    """
    from pipeline import bench as benching

    with _board(rpc, key) as board, _progress("timing") as advance:
        if board is not None and profile:
            raise ValueError(f"--profile does not reach {board}: kernels are timed by a callback; profile on the board")
        result = benching.bench(
            folders, onnx, threads, rounds, lambda done, total: advance(done, total, "rounds"), board
        )
    if file is not None:
        file.write_text(result.model_dump_json(indent=2) + "\n")
    kernels = benching.profile(folders[0]) if profile else None
    if as_json:
        _print_json({**result.model_dump(), **({"profile": kernels.model_dump()} if kernels else {})})
        return
    slowest = max(m.median_us for m in result.measurements)
    rows = [
        (
            m.name,
            m.runtime,
            f"{m.median_us:.1f}",
            f"{m.p10_us:.1f}",
            f"{m.p90_us:.1f}",
            f"{slowest / m.median_us:.2f} x",
        )
        for m in result.measurements
    ]
    where = f" on {board}, over RPC" if board else ""
    if result.emulated:
        where += ", EMULATED: these times say nothing about the CPU"
    title = f"{result.cpu}{where}, {threads} thread(s), {result.date}"
    _table(title, ("subject", "runtime", "median us", "p10", "p90", "speed"), rows)
    if kernels is not None:
        whole = sum(kernel.us for kernel in kernels.kernels)
        shares = [
            (
                k.kernel,
                f"{k.us:.1f}",
                f"{k.us / whole:.1%}",
                k.kind,
                _short(k.macs),
                f"{k.bytes:,}",
                "-" if k.of_ceiling is None else f"{k.of_ceiling:.0%}",
            )
            for k in kernels.kernels
        ]
        columns = ("kernel", "us", "of time", "kind", "MACs", "bytes", "of ceiling")
        _table(f"kernels of {folders[0]}", columns, shares, right=(1, 2, 4, 5, 6))
        known = ", ".join(f"{kind} {rate:.1f} G MAC/s" for kind, rate in kernels.ceilings.items())
        out.print(f"ceiling: {known or kernels.no_ceiling}", highlight=False)


@app.command()
def board(
    target: Annotated[str, typer.Option("--target", "-t", help="A name of `crossbit targets`: the board's CPU.")],
    folder: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the server.")] = None,
    emulate: Annotated[bool, typer.Option(help="Run it here instead, on an emulated CPU, until Ctrl-C.")] = False,
    tracker: Annotated[str, typer.Option(metavar="HOST:PORT", help="The TVM tracker.")] = "127.0.0.1:9190",
    key: Annotated[str | None, typer.Option(help="The name to register with; default: the target's.")] = None,
) -> None:
    """Build the server that makes a board of a machine: one file, without Python, for verify, bench and tune --rpc.

    Example: crossbit board --target cortex-a72 -o board

    Example: crossbit board --target cortex-a72 --emulate --tracker 127.0.0.1:9190 --key rpi4
    """
    import shutil

    from pipeline import board as boards
    from pipeline import emulator

    if emulate == (folder is not None):
        raise ValueError("give -o FOLDER to build the server for a board, or --emulate to run it here")
    chosen = targets.load(target)
    if emulate:  # before minutes of compiling
        emulator.command(chosen)
        emulator.check_c_library(chosen)
    with _progress("building the server") as advance:
        server = boards.build(chosen, lambda done, total: advance(done, total, f"for {chosen.machine}"))
    key = key or chosen.name
    if emulate:
        _say("emulated", f"{chosen.name} as board '{key}': results are exact, times mean nothing; Ctrl-C ends it")
        boards.emulate(chosen, server, tracker, key)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copy(server, folder))
    port = tracker.rpartition(":")[2]
    _say(
        "built",
        f"{copy}: {copy.stat().st_size:,} bytes for {chosen.machine}, glibc {boards.oldest_glibc(copy)} or newer",
    )
    out.print(
        f"start a tracker here:  python -m tvm.exec.rpc_tracker --port {port}\n"
        f"copy the server:       scp {copy} USER@BOARD:\n"
        f"start it there:        ./{copy.name} --tracker ADDRESS-OF-THIS-MACHINE:{port} --key {key}\n"
        f"use it from here:      crossbit verify ARTIFACT --rpc {tracker} --key {key}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that holds trainings, artifacts and a bench.json.")],
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Default: report.html in the folder.")] = None,
) -> None:
    """Write one HTML page of everything crossbit left below a folder: accuracy, size, latency, layers.

    Example: crossbit report runs/demo
    """
    from pipeline import report as reporting

    path = file or folder / "report.html"
    reporting.write(folder, path)
    _say("reported", str(path))


@app.command("targets")
def list_targets(as_json: Json = False) -> None:
    """List the targets, and which of them this machine runs; those without TVM's runtime are for C source.

    Example: crossbit targets
    """
    records = [targets.load(name) for name in targets.names()]
    if as_json:
        _print_json([{**dataclasses.asdict(r), "features": sorted(r.features)} for r in records])
        return
    best = targets.host().name if any(not r.missing_features() for r in records) else None
    rows = [
        (
            r.name,
            r.gpu.arch if r.gpu else f"{r.registers} x {r.vector_bits} bit",
            r.popcount,
            "host" if r.name == best else ", ".join(r.missing_features()) or "runs" if r.tvm_runtime else "C source",
        )
        for r in records
    ]
    _table("targets", ("target", "registers or GPU", "popcount", "here (or what is missing)"), rows)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the published methods: their quantisers, bits and operations, their formula and source.

    Example: crossbit methods
    """
    from pipeline import quantizers, stacked

    found = {**quantizers.methods(), "stacked": stacked.METHOD}
    if as_json:
        _print_json([{"name": name, "bits": m.bits, **dataclasses.asdict(m)} for name, m in found.items()])
        return
    rows = [(m.title, f"{m.weight} {m.activation}", m.bits, m.operations, m.formula, m.source) for m in found.values()]
    _table("methods", ("method", "quantisers", "bits", "operations", "formula", "source"), rows)


@app.command()
def similarity(
    source: Annotated[Path, typer.Argument(help="A training folder, a checkpoint or an ONNX file, filter-wise.")],
    plot: Annotated[Path | None, typer.Option(help="Draw scales and prices to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Show how alike the scales of each layer's filters are, and what sharing them costs.

    Example: crossbit similarity runs/m1
    """
    from pipeline import convert as converting

    layers = converting.layers(source)
    if plot is not None:
        from pipeline import plots

        plots.similarity(plot, layers)
    if as_json:
        _print_json([layer.summary() for layer in layers])
        return
    shown = (2, 4, 8, 16, 32)
    rows = [
        (
            layer.name,
            str(len(layer.scales)),
            f"{layer.spread:.1%}",
            *(f"{layer.relative_price(m):.2%}" for m in (*shown, len(layer.scales))),
        )
        for layer in layers
    ]
    columns = ("layer", "filters", "spread", *(f"M = {m}" for m in shown), "all")
    _table(f"{source}: price of sharing, of the weights' energy", columns, rows, right=tuple(range(1, len(columns))))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A training folder, a checkpoint or an ONNX file, filter-wise.")],
    result: Annotated[Path, typer.Option("--output", "-o", help="A training folder, or an ONNX file, as the source.")],
    group: Annotated[int | None, typer.Option(min=1, help="M, filters per scale, in every layer.")] = None,
    budget: Annotated[float | None, typer.Option(help="The largest M per layer whose price is at most this.")] = None,
    activation: Annotated[str | None, typer.Option(help="Of a float network; default: its recipe's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw scales, prices and the chosen M to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Make a trained network cross-filter: the bits stay, M neighbours share the mean of their scales.

    Fine-tune a converted training folder with `crossbit train RECIPE --start`.

    Example: crossbit convert runs/m1 -o runs/m1-shared --budget 0.02
    """
    from pipeline import convert as converting
    from pipeline import similarity as alike

    layers = converting.layers(source, activation)
    groups = alike.pick(layers, group, budget)
    converting.convert(source, result, groups, activation)
    if plot is not None:
        from pipeline import plots

        plots.similarity(plot, layers, groups)
    if as_json:
        _print_json([{**layer.summary(), "group": groups[layer.name]} for layer in layers])
        return
    rows = [
        (
            layer.name,
            str(len(layer.scales)),
            str(groups[layer.name]),
            str(len(layer.shared(groups[layer.name]))),
            f"{layer.relative_price(groups[layer.name]):.2%}",
        )
        for layer in layers
    ]
    columns = ("layer", "filters", "M", "scales", "price")
    _table(f"{source}: price in the weights' energy", columns, rows, right=(1, 2, 3, 4))
    _say("converted", str(result))


@app.command()
def cost(
    channels: Annotated[int, typer.Option(min=1, help="Input channels of the layer; its filters do not matter.")] = 256,
    kernel: Annotated[int, typer.Option(min=1, help="Side of the square kernel.")] = 3,
    word: Annotated[int, typer.Option(min=1, help="L, binary operations at once: 64, or 512 for AVX-512.")] = 64,
    group: Annotated[int, typer.Option(min=1, help="M, neighbouring filters that share a scale.")] = 16,
    measure: Annotated[bool, typer.Option(help="Also time XNOR and float convolutions here, about a minute.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the speed-up over channels to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the papers' cost model of one layer: the speed-up of cross-filter compression and of every other method.

    Example: crossbit cost --channels 256 --kernel 3 --word 64 --group 16
    """
    from pipeline import cost as model

    summary: dict[str, Any] = {
        "channels": channels,
        "kernel": kernel,
        "word": word,
        "group": group,
        "gamma": model.GAMMA,
        "speedup": model.speedup(channels, kernel, word, group),
        "speedup_filterwise": model.speedup(channels, kernel, word),
        "boundary": model.boundary(word, group),
        "memory_ratio": model.memory_ratio(channels, kernel, group),
        "multiplications_per_output": {"model": 1 / group, "exact": model.multiplications(group, 1, group) / group},
        "methods": [dataclasses.asdict(row) for row in model.table(channels, kernel, word, group)],
    }
    points = []
    if measure:
        from pipeline import cost_measured

        with _progress("timing") as advance:
            points = cost_measured.measure(
                sorted({64, 128, 256, channels}),
                kernel,
                sorted({1, group}),
                on_round=lambda done, total: advance(done, total, "rounds"),
            )
        summary |= {"cpu": targets.cpu_name(), "measured": [dataclasses.asdict(p) for p in points]}
    if plot is not None:
        from pipeline import plots

        plots.speedups(plot, word, group, points, targets.cpu_name())
    if as_json:
        _print_json(summary)
        return
    rows = [
        (
            row["method"],
            f"{row['macs']:g}",
            f"{row['additions']:g}",
            f"{row['binary_operations']:g}",
            f"{row['speedup']:.2f} x" if row["computed"] else f"~{row['speedup']:g} x",
            row["published"],
        )
        for row in summary["methods"]
    ]
    title = f"model: operations counted, nothing timed; {channels} channels, {kernel}x{kernel}, L = {word}"
    columns = ("method", "MACs", "additions", "binary a weight", "speed-up", "papers print (recalled)")
    _table(title, columns, rows, right=(1, 2, 3, 4))
    out.print(
        f"eq 17, the paper's speed-up: {summary['speedup']:.2f} x at M = {group}, "
        f"{summary['speedup_filterwise']:.2f} x at M = 1\n"
        f"weights {summary['memory_ratio']:.2f} x smaller; one 5x5 layer beats two 3x3 up to "
        f"{summary['boundary']:.2f} channels\n"
        f"the model charges 1/{group} multiplication an output; a scaled float output takes 1, for any M",
        highlight=False,
        soft_wrap=True,
    )
    if points:
        measured = [
            (
                str(p.channels),
                str(p.group),
                f"{p.float_us:.1f}",
                f"{p.onnxruntime_us:.1f}",
                f"{p.binary_us:.1f}",
                f"{p.speedup:.2f} x",
                f"{p.onnxruntime_us / p.binary_us:.2f} x",
            )
            for p in points
        ]
        title = f"measured, not modelled: {targets.cpu_name()}, 1 thread, {kernel}x{kernel} at 14x14"
        heads = ("channels", "M", "float us", "ONNX Runtime us", "XNOR us", "over float", "over ONNX Runtime")
        _table(title, heads, measured, right=tuple(range(7)))


# Output ----------------------------------------------------------------------------------------------------------


def _toml_value(text: str) -> Any:
    """What ``text`` means in TOML; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _warn(sentence: str) -> None:
    err.print(escape(sentence), highlight=False, soft_wrap=True)


def _say(word: str, text: str) -> None:
    """What was done, on one line."""
    colour = "red" if word == "differs" else "green"
    out.print(f"[{colour}]{word}[/{colour}] {escape(text)}", soft_wrap=True, highlight=False)


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count else "-"


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A bar on the terminal's error stream; yields advance(done, total, label)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, label: progress.update(
            task, completed=done, total=total, description=f"{what} {label}"
        )


def _refuse(sentence: str) -> NoReturn:
    err.print(f"[red]error:[/red] {escape(sentence)}", markup=True, highlight=False, soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Run; bad input is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        extra = next((extra for extra, modules in _EXTRAS.items() if module in modules), None)
        if extra is None:
            raise
        _refuse(f"this command needs {module}: run `pip install '.[{extra}]'` in crossbit's folder")
    except KeyboardInterrupt:
        err.print("interrupted; what was finished is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
