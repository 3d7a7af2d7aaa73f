"""The tuning records that crossbit ships: what beats the default schedules of five networks.

    .venv/bin/python scripts/make_records.py [--core NAME] [--trials N] [--work DIR]
    .venv/bin/python scripts/make_records.py --core x86-avx512vnni --core x86-avx512bw --core x86-avx2 --trials 8
    .venv/bin/python scripts/make_records.py --core cuda-sm90 --trials 64 [--carry DIR]

To be run after a change of what kernels compute, as tests/test_counted_runner.py will say. Random weights, one thread,
one image. All that is measured stays in the work folder, so a stopped run goes on where it was. When a target has all
networks, what beats the default by more than 2 % goes to pipeline/records.

The ARM cores, which are the default, are not timed: cycles are counted by the model of `pipeline/cycle_model.py`. A CPU
that this machine is, or whose instructions it has, is timed here, and at the end the best candidates of every kernel
once more, in turns. GPUs are timed here, or with --carry where its folders, one a network, are carried to.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

CORES = ("cortex-a72", "cortex-a53", "cortex-a76")
# Name: model, shape of an image, classes, options. The first is the network of the recipe digits.
NETWORKS: dict[str, tuple[str, tuple[int, int, int], int, dict[str, Any]]] = {
    "digits": ("vgg_small", (1, 8, 8), 10, {}),
    "resnet18": ("resnet18", (3, 224, 224), 1000, {"stem": "imagenet"}),
    "vgg7": ("vgg7", (3, 32, 32), 10, {}),
    "nin": ("nin", (3, 32, 32), 10, {}),
    "alexnet": ("alexnet", (3, 227, 227), 1000, {}),
}


def export_network(network: str, file: Path) -> None:
    """Write a network as an ONNX file. Its kernels depend on its shapes and not on its weights."""
    from pipeline import models
    from pipeline.export import export

    name, shape, classes, options = NETWORKS[network]
    export(models.build(name, shape, classes, models.Quantize(group=16), **options).eval(), shape, file)


def main(
    core: Annotated[list[str] | None, typer.Option(help="A core; again for more. Without: all.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Candidates per kernel, those in the work folder included.")] = 32,
    work: Annotated[Path, typer.Option(help="Where all that is measured is kept.")] = Path("records"),
    carry: Annotated[Path | None, typer.Option(help="Where candidates for a GPU go that is elsewhere.")] = None,
) -> None:
    """Search, and keep the best."""
    import targets
    from pipeline import compiler, importer, tune

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        files = {network: Path(folder) / f"{network}.onnx" for network in NETWORKS}
        for network, file in files.items():
            export_network(network, file)
        for target in map(targets.load, core or CORES):
            measured, shipped = (tune.records_folder(root, target, 1) for root in (work, tune.SHIPPED))
            missing = 0
            networks = {network: compiler.lower(importer.load(file, 1, target)) for network, file in files.items()}
            for network, lowered in networks.items():
                start = time.monotonic()
                if carry is None:
                    tuned = tune.tune(lowered, target, 1, measured, trials, seed=0, warn=console.print)
                else:
                    batch = carry / f"{target.name}-{network}"
                    tuned, waiting = tune.tune_gpu(
                        lowered, target, 1, measured, trials, seed=0, warn=console.print, carried=batch
                    )
                    if waiting:
                        console.print(f"{waiting} candidates wait for {batch}/run.py on a machine with the GPU")
                        missing += waiting
                        continue
                default, best = sum(kernel.default for kernel in tuned), sum(kernel.best for kernel in tuned)
                console.print(
                    f"{target.name} {network}: {default:,.0f} -> {best:,.0f} {tuned[0].unit}, each kernel once; "
                    f"{time.monotonic() - start:.0f} s"
                )
            if not missing:
                start, kept = time.monotonic(), tune.keep_best(measured, shipped, target, networks.values())
                console.print(f"{target.name}: {kept} records shipped; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
