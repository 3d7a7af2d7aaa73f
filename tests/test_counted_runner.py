"""Tuning by counted cycles: what is counted, what is refused, and the records that ship."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import machines
import numpy as np
import pytest
from c_apps import build, by_runtime
from networks import dyadic, randomise
from torch import nn
from tvm.s_tir import meta_schedule as ms

import targets
from pipeline import artifact, cli, compiler, counted_runner, cycle_model, importer, toolchain, tune
from pipeline.builder import Builder
from pipeline.counted_runner import CountedRunner
from pipeline.export import export
from pipeline.layers import QuantConv2d
from pipeline.packaging import compile_network
from targets import Target

REMAKE = "run `.venv/bin/python scripts/make_records.py` and commit pipeline/records"
SHIPPED = sorted(folder.name.removesuffix("-1t") for folder in tune.SHIPPED.iterdir())


@pytest.fixture
def a72() -> Target:
    target = targets.load("cortex-a72")
    machines.need(target)
    try:
        counted_runner.check(target, 1)
    except ValueError as error:
        pytest.skip(str(error))
    return target


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One binary convolution, from floats to floats."""
    path = tmp_path_factory.mktemp("counted") / "model.onnx"
    network = nn.Sequential(nn.BatchNorm2d(32), QuantConv2d(32, 64, 3, padding=1, group=16))
    export(randomise(network, np.random.default_rng(0)), (32, 8, 8), path)
    return path


def program(target: Target, code: str, folder: Path) -> Path:
    """An executable whose kernel, a function of no arguments, is ``code``."""
    folder.mkdir()
    function = f"int {counted_runner._SYMBOL}(void) {{ {code} return 0; }}"
    (folder / "main.c").write_text(
        f"#include <stdlib.h>\n{function}\nint main(void) {{ return {counted_runner._SYMBOL}(); }}"
    )
    tools = toolchain.find(target)
    tools.run(*tools.cc, "-static", "-o", f"{folder}/program", f"{folder}/main.c")
    return folder / "program"


def results(runner: Any, programs: list[Path]) -> list[Any]:
    return [future.result() for future in runner.run([ms.runner.RunnerInput(str(p), "cpu", []) for p in programs])]


def test_identical_programs_are_counted_once(a72: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (f"for (volatile int i = 0; i < {times}; i++);" for times in (10, 1000))
    programs = [program(a72, code, tmp_path / str(i)) for i, code in enumerate((short, long, short))]
    counted, real = [], cycle_model.count
    monkeypatch.setattr(cycle_model, "count", lambda *given: counted.append(given[1]) or real(*given))
    runner = CountedRunner(a72, 60)
    first, second, again = results(runner, programs)
    assert (len(counted), list(again.run_secs)) == (2, list(first.run_secs))
    assert 50 * first.run_secs[0] < second.run_secs[0] < 150 * first.run_secs[0]
    assert list(results(runner, programs[1:2])[0].run_secs) == list(second.run_secs)
    assert len(counted) == 2


@pytest.mark.parametrize(
    ("code", "seconds", "sentence"),
    [
        ("abort();", 60, r"qemu-aarch64 ended with -6: .+"),
        ("exit(3);", 60, r"qemu-aarch64 ended with 3: it says nothing"),
        ("for (;;);", 1, r"it ran more than 1 s under QEMU"),
    ],
)
def test_a_candidate_that_fails_says_why(a72: Target, code: str, seconds: float, sentence: str, tmp_path: Path) -> None:
    (result,) = results(CountedRunner(a72, seconds), [program(a72, code, tmp_path / "it")])
    assert result.run_secs is None
    assert re.fullmatch(sentence, str(result.error_msg)), result.error_msg


@pytest.mark.slow
def test_a_build_that_takes_too_long_says_so(a72: Target, model: Path) -> None:
    llvm = a72.tvm_target(1)
    task, *_ = ms.relax_integration.extract_tasks(compiler.lower(importer.load(model, 1, a72)), llvm)
    builder = Builder(counted_runner.build, a72, 0.001)
    (built,) = builder.build([ms.builder.BuilderInput(task.dispatched[0], llvm)])
    builder.close()
    assert built.error_msg == "it took more than 0.001 s to build"


def test_tuning_counts_where_it_cannot_time(a72: Target, model: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    """The default schedule costs the same cycles every time, and the best record gives the same floats."""
    records, lowered = tune.records_folder(tmp_path, a72, 1), compiler.lower(importer.load(model, 1, a72))
    (tuned,) = tune.tune(lowered, a72, 1, records, 3, int(rng.integers(1000)))
    assert (tuned.kernel, tuned.unit) == ("bitserial_conv2d", "model cycles")
    steps = 8 * 8 * 64 * 9 * 32 / 128
    assert 1.5 * steps < tuned.best <= tuned.default < 10 * steps
    (again,) = tune.tune(lowered, a72, 1, tmp_path / "again", 1, 0)
    assert again.default == tuned.default
    with pytest.raises(ValueError, match=r"measured in model cycles, and this search measures in us: give it another"):
        tune.claim(records, a72, 1, "us")
    folder = tmp_path / "net"
    assert compile_network(model, folder, a72, 1, records=records, emit="c-lib").tuned_kernels == 1
    x = {"x": dyadic(rng, (1, 32, 8, 8))}
    (out,) = build(folder).run([x])
    np.testing.assert_array_equal(out["y"], by_runtime(model, x)["y"])


def test_several_threads_are_refused(a72: Target, model: Path, tmp_path: Path) -> None:
    lowered = compiler.lower(importer.load(model, 1, a72))
    with pytest.raises(ValueError, match=r"counted cycles say nothing about 2 threads: give --threads 1, or a board"):
        tune.tune(lowered, a72, 2, tmp_path / "records", 1, 0)
    assert not (tmp_path / "records").exists()


def test_a_missing_tool_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "llvm-mca-22" else found(name))
    lowered = compiler.lower(importer.load(model, 1, targets.load("cortex-a72")))
    with pytest.raises(ValueError, match=r"llvm-mca-22 is missing: apt-get install llvm-22"):
        tune.tune(lowered, targets.load("cortex-a72"), 1, tmp_path / "records", 1, 0)


# Shipped records -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_records() -> ModuleType:
    """The script."""
    path = Path(__file__).parents[1] / "scripts" / "make_records.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def digits(make_records: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file."""
    path = tmp_path_factory.mktemp("digits") / "digits.onnx"
    make_records.export_network("digits", path)
    return Path(path)


def test_targets_of_shipped_records(make_records: ModuleType) -> None:
    assert set(make_records.CORES) <= set(SHIPPED) <= set(targets.names())
    assert tune.shipped_records(targets.load("x86-avx512"), 1) is None  # which no machine here could measure


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_records_are_found(name: str, digits: Path) -> None:
    target = targets.load(name)
    folder = tune.shipped_records(target, 1)
    assert folder is not None
    tune.check_records(folder, target, 1)
    lowered = compiler.lower(importer.load(digits, 1, target))
    _, kernels, tuned = compiler.scheduled(lowered, target, 1, folder)
    assert 0 < tuned <= kernels, f"no kernel of digits has a shipped record for {name} any more: {REMAKE}"


@pytest.mark.parametrize(
    ("options", "tuned"),
    [("", True), ("--records none", False), ("--threads 2", False), ("--emit c-lib", True), ("--emit c-source", False)],
)
def test_compile_uses_shipped_records(
    options: str, tuned: bool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = targets.load(SHIPPED[0])
    machines.need(target)
    folder = tmp_path / "net"
    arguments = ["compile", str(digits), "-o", str(folder), "--target", target.name, *options.split()]
    monkeypatch.setattr("sys.argv", ["crossbit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert bool(artifact.read(folder).tuned_kernels) is tuned
    assert not (folder / artifact.RECORDS).exists()


def test_records_of_instructions_are_no_c_source(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tuning records hold for one CPU's instructions, and C source has none"):
        compile_network(model, tmp_path / "net", targets.load("cortex-a72"), 1, records=tmp_path, emit="c-source")


@pytest.mark.slow
def test_no_shipped_record_is_left_over(make_records: ModuleType, tmp_path: Path) -> None:
    """Every one is of a kernel of today."""
    files = [tmp_path / f"{network}.onnx" for network in make_records.NETWORKS]
    for file in files:
        make_records.export_network(file.stem, file)
    for target in map(targets.load, SHIPPED):
        today = ms.database.MemoryDatabase()
        for file in files:
            lowered = compiler.lower(importer.load(file, 1, target))
            for task in ms.relax_integration.extract_tasks(lowered, target.tvm_target(1)):
                today.commit_workload(task.dispatched[0])
        folder = tune.records_folder(tune.SHIPPED, target, 1)
        records = compiler.open_records(folder, target).get_all_tuning_records()
        orphans = [r for r in records if not today.has_workload(r.workload.mod)]
        assert not orphans, f"{len(orphans)} of {len(records)} records for {target.name} are of no kernel: {REMAKE}"
