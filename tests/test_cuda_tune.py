"""Tuning for GPUs, on an emulated one: candidates that are carried there and back, and those measured at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_machine
import numpy as np
import pytest
import tvm
from networks import randomise
from torch import nn

import targets
from pipeline import cli, compiler, cuda_runner, importer, session, tune
from pipeline.cuda_batch import Batch
from pipeline.export import export
from pipeline.layers import QuantConv2d
from pipeline.packaging import compile_network
from targets import Target
from tvm_ops import schedule_cuda
from tvm_ops.cuda.tile import Tile

TRIALS = 4
need_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++ (apt-get install g++)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution that writes bits, and one that writes floats."""
    path = tmp_path_factory.mktemp("cuda_tune") / "model.onnx"
    first, second = QuantConv2d(32, 32, 3, padding=1, group=16), QuantConv2d(32, 32, 1, group=16)
    network = nn.Sequential(nn.BatchNorm2d(32), first, nn.BatchNorm2d(32), second)
    export(randomise(network, np.random.default_rng(0)), (32, 4, 4), path)
    return path


def lowered(model: Path, target: Target) -> tvm.IRModule:
    return compiler.lower(importer.load(model, 1, target))


class Carried:
    """Tuning by a folder of candidates."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.mod, self.target = lowered(model, targets.load("cuda-sm86")), targets.load("cuda-sm86")
        self.records = tune.records_folder(folder / "records", self.target, 1)
        self.batch = folder / "batch"
        self.said: list[str] = []

    def again(self, trials: int = TRIALS) -> tuple[list[tune.Tuned], int]:
        return tune.tune_gpu(
            self.mod, self.target, 1, self.records, trials, 0, warn=self.said.append, carried=self.batch
        )

    @property
    def kernels(self) -> list[dict[str, Any]]:
        return list(json.loads((self.batch / cuda_runner.MANIFEST).read_text())["kernels"])

    def script(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """The folder's script, in a Python that has NumPy and nothing of ours."""
        empty = self.batch.parent / "empty"
        for name in ("pipeline", "targets", "tvm", "tvm_ops", "torch"):
            (empty / name).mkdir(parents=True, exist_ok=True)
            (empty / name / "__init__.py").write_text("raise ImportError\n")
        environment = {**os.environ, **environment, "PYTHONPATH": str(empty)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, self.batch / "run.py"], env=environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def stub(cubin: Path, status: int) -> None:
    """Make a candidate's kernel one that writes nothing."""
    code = f"int emulated_main_kernel(const unsigned *n, void **p) {{ return {status}; }}"
    cubin.unlink()
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", cubin], input=code, text=True, check=True)


@pytest.mark.slow
@need_emulator
def test_candidates_are_carried(
    model: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, so that one worker builds them, and once."""
    cuda_machine.emulate(monkeypatch)
    tuning, where = Carried(model, tmp_path), cuda_machine.driver(tmp_path)
    assert tuning.again() == ([], 2 * TRIALS)
    assert [kernel["default"] == kernel["candidates"][0] for kernel in tuning.kernels] == [True, True]
    what_is_built_is_not_built_again(tuning, monkeypatch)
    wrong, broken = tuning.kernels[0]["candidates"][1], tuning.kernels[1]["candidates"][1]
    stub(tuning.batch / f"{wrong['digest']}.cubin", status=0)
    stub(tuning.batch / f"{broken['digest']}.cubin", status=700)
    an_interrupted_run_goes_on(tuning, where)
    best = the_results_become_records(tuning, wrong, broken, rng)
    compiling_takes_the_best(tuning, best, model, tmp_path, monkeypatch)
    more_trials_are_another_batch(tuning, where)


def what_is_built_is_not_built_again(tuning: Carried, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuning.kernels
    with monkeypatch.context() as patch:
        patch.setattr(cuda_machine.EmulatedNvcc, "compile_kernels", None)
        assert tuning.again() == ([], 2 * TRIALS)
    assert tuning.kernels == before


def an_interrupted_run_goes_on(tuning: Carried, where: dict[str, str]) -> None:
    process = tuning.script(where)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGINT)  # as a terminal does
    process.communicate()
    assert process.returncode == 130
    first = cuda_runner.results(tuning.batch)
    assert 1 <= len(first) < 2 * TRIALS
    said, error = (process := tuning.script(where)).communicate()
    assert (process.returncode, len(said.splitlines())) == (0, 2 * TRIALS - len(first)), error
    found = cuda_runner.results(tuning.batch)
    assert len(found) == 2 * TRIALS and first.items() <= found.items()


def the_results_become_records(
    tuning: Carried, wrong: dict[str, Any], broken: dict[str, Any], rng: np.random.Generator
) -> dict[str, float]:
    """Returns the best seconds by the name of their kernel: one candidate of each is made the fastest."""
    best = {}
    found = cuda_runner.results(tuning.batch)
    for kernel in tuning.kernels:
        fast = rng.choice([one["digest"] for one in kernel["candidates"][2:]])
        found[fast]["seconds"], best[kernel["name"]] = [1e-9, 3e-9], 2e-9
    lines = [json.dumps({"digest": digest, **result}) + "\n" for digest, result in found.items()]
    (tuning.batch / cuda_runner.RESULTS).write_text("".join(lines))

    tuned, waiting = tuning.again()
    assert waiting == 0 and len(tuned) == 2
    for kernel in tuned:
        assert (kernel.unit, kernel.trials) == ("us", TRIALS)
        assert kernel.best == pytest.approx(1e6 * best[kernel.kernel]) and kernel.default > kernel.best
    assert "bytes differ from what the default schedule writes" in tuning.said[0]
    assert tuning.said[1].endswith("cuLaunchKernel returns 700") and len(tuning.said) == 2
    assert "error" in found[wrong["digest"]] and "error" in found[broken["digest"]]
    identity = json.loads((tuning.records / "target.json").read_text())
    assert identity == {"target": "cuda-sm86", "threads": 1, "unit": "us", "gpus": ["emulated"]}
    records = (tuning.records / "database_tuning_record.json").read_text().splitlines()
    assert len(records) == 2 * TRIALS
    assert not list(tuning.batch.glob("*.cubin")) and not tuning.kernels
    assert tuning.again() == (tuned, 0) and len(tuning.said) == 2
    return best


def compiling_takes_the_best(
    tuning: Carried, best: dict[str, float], model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = compiler.open_records(tuning.records, tuning.target).get_all_tuning_records()
    fastest = [r.trace for r in records if any(tune._seconds(r) == pytest.approx(s) for s in best.values())]
    written, real = [], Tile.of
    with monkeypatch.context() as patch:
        patch.setattr(Tile, "of", lambda number: written.append(number) or real(number))
        manifest = compile_network(model, folder / "tuned", tuning.target, 1, records=tuning.records)
    assert sorted(written) == sorted(schedule_cuda.drawn_tile(trace) for trace in fastest)
    assert manifest.tuned_kernels == 2
    verdict = session.verify(folder / "tuned")
    assert verdict.passed and verdict.error == 0


def more_trials_are_another_batch(tuning: Carried, where: dict[str, str]) -> None:
    tuned, waiting = tuning.again(TRIALS + 1)
    assert (len(tuned), waiting) == (2, 2)
    process = tuning.script(where)
    assert (process.communicate()[1], process.returncode) == ("", 0)
    tuned, waiting = tuning.again(TRIALS + 1)
    assert [kernel.trials for kernel in tuned] == [TRIALS + 1] * 2 and waiting == 0


@pytest.mark.slow
@need_emulator
def test_on_a_machine_with_the_gpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_machine.emulate(monkeypatch)
    monkeypatch.setattr(targets, "capability", lambda: (8, 6))
    for name, value in cuda_machine.driver(tmp_path).items():
        monkeypatch.setenv(name, value)
    target, told = targets.load("cuda-sm86"), []
    records = tune.records_folder(tmp_path, target, 1)
    tuned = tune.tune(lowered(model, target), target, 1, records, 2, 0, lambda *event: told.append(event))
    assert [kernel.trials for kernel in tuned] == [2, 2]
    assert all(0 < kernel.best <= kernel.default for kernel in tuned)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert (told[-1][1:], {total for *_, total in told}) == ((4, 4), {4})
    measured = (records / "database_tuning_record.json").read_text()
    assert tune.tune(lowered(model, target), target, 1, records, 2, 0) == tuned
    assert (records / "database_tuning_record.json").read_text() == measured


def test_every_tile_is_a_candidate_once(model: Path) -> None:
    """With enough trials, and the rule's own is the default schedule, not a draw."""
    target = targets.load("cuda-sm90")
    mod = tvm.IRModule({"main": lowered(model, target)["bitserial_gemm"]})
    tilings, default = schedule_cuda.tilings(mod, target), compiler.default_schedule(mod, target, 1)
    numbers = [schedule_cuda.drawn_tile(sch.trace) for sch in tilings]
    assert len(set(numbers)) == len(numbers) > 10
    tvm.ir.assert_structural_equal(default.mod, tilings[0].mod)
    wanted = tune._wanted([], default, tilings, len(tilings) + 10, seed=0)
    assert wanted[0] is default and set(wanted[1:]) == set(tilings[1:])
    few = tune._wanted([], default, tilings, 5, seed=0)
    assert few == wanted[:5] and tune._wanted([], default, tilings, 5, seed=1)[1:] != few[1:]
    assert tune._wanted(wanted[:3], default, tilings, 5, seed=0) == wanted[3:5]  # of records, it reads the traces


def test_a_batch_is_machine_code_of_the_target(model: Path, tmp_path: Path) -> None:
    target = targets.load("cuda-sm90")
    nvcc = cuda_machine.need_nvcc(target)
    batch = Batch(tmp_path / "batch", target)
    mod = tvm.IRModule({"main": lowered(model, target)["bitserial_gemm"]})
    functions = [sch.mod["main"] for sch in schedule_cuda.tilings(mod, target)[:2]]
    batch.add("kernel", functions[0], functions)
    batch.write()
    for file in batch.folder.glob("*.cubin"):
        ((architecture, kernel),) = nvcc.machine_code(file)
        assert (architecture, kernel) == ("sm_90", "main_kernel")
    assert len(list(batch.folder.glob("*.cubin"))) == batch.waiting == 2


def test_times_that_cannot_be_are_refused() -> None:
    for seconds in ([1e-6, 0.0], [float("nan")], [-1e-6], [61.0]):
        with pytest.raises(ValueError, match="it says that a call took"):
            tune._plausible(seconds)
    assert tune._plausible([1e-6, 2e-6]) == [1e-6, 2e-6]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "capability", "sentence"),
    [
        ([], None, "is measured on its own GPU, and this machine has no NVIDIA GPU: give --carry FOLDER"),
        ([], (8, 6), "and this machine has one of compute capability 8.6: give --carry FOLDER"),
        (["--rpc", "127.0.0.1:1", "--key", "a"], (8, 0), "are not measured over RPC: give --carry FOLDER"),
        (["--threads", "2"], (8, 0), "target cuda-sm80 is a GPU, which has no use for 2 threads"),
        (["--carry", "batch", "--target", "host"], None, "is no GPU, and only candidates for GPUs are carried"),
        (["--carry", "batch", "--rpc", "127.0.0.1:1", "--key", "a"], None, "give one of them"),
        (["--carry", "."], None, "not empty, and no candidates of `crossbit tune`"),
        (["--carry", "sm90"], None, "sm90: its candidates are for cuda-sm90, not cuda-sm80"),
    ],
)
def test_what_is_refused(
    options: list[str],
    capability: tuple[int, int] | None,
    sentence: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda_machine.emulate(monkeypatch)
    monkeypatch.setattr(targets, "capability", lambda: capability)
    monkeypatch.chdir(tmp_path)
    Batch(Path("sm90"), targets.load("cuda-sm90"))
    command = ["crossbit", "tune", str(model), "--target", "cuda-sm80", *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_script_refuses_a_machine_without_the_gpu(tmp_path: Path) -> None:
    if targets.capability() is not None:
        pytest.skip("this machine has a GPU")
    shutil.copy(cuda_runner.__file__, tmp_path / "run.py")
    (tmp_path / "manifest.json").write_text(json.dumps({"arch": "sm_90", "kernels": []}))
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: no NVIDIA GPU answers here \(.*\)\n", done.stderr)


@need_emulator
def test_the_script_refuses_another_gpu(tmp_path: Path) -> None:
    shutil.copy(cuda_runner.__file__, tmp_path / "run.py")
    (tmp_path / "manifest.json").write_text(json.dumps({"arch": "sm_90", "kernels": []}))
    environment = {**os.environ, **cuda_machine.driver(tmp_path)}
    command = [sys.executable, tmp_path / "run.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    sentence = "error: these candidates are for sm_90, and this GPU, emulated, is sm_86\n"
    assert (done.returncode, done.stderr) == (2, sentence)
