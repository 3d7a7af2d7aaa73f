"""Tuning: records that appear once, are used, change no result, and are refused where they do not belong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import dyadic, randomise
from torch import nn

import targets
from pipeline import artifact, bench, compiler, importer, session, tune
from pipeline.export import export
from pipeline.layers import QuantConv2d
from pipeline.packaging import compile_network, oracle
from pipeline.session import Session
from pipeline.tune import Tuned, check_records, records_folder

TRIALS = 2


def files(folder: Path) -> dict[str, bytes]:
    """What is stored, without logs."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".json"}


class Run:
    """One tuning of a small network whose one convolution writes bits and whose other writes floats."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model.onnx"
        self.target = targets.host()
        self.records = records_folder(folder / "records", self.target, 1)
        network = nn.Sequential(
            nn.BatchNorm2d(32),
            QuantConv2d(32, 64, 3, padding=1, group=16),
            nn.BatchNorm2d(64),
            QuantConv2d(64, 32, 1, group=16),
        )
        export(randomise(network, np.random.default_rng(0)), (32, 8, 8), self.model)

    def again(self, trials: int = TRIALS) -> tuple[list[Tuned], list[tuple[str, int, int]]]:
        """Tune; also what was told while at it."""
        told: list[tuple[str, int, int]] = []
        lowered = compiler.lower(importer.load(self.model, 1, self.target))
        tuned = tune.tune(lowered, self.target, 1, self.records, trials, 0, lambda *event: told.append(event))
        return tuned, told


Tuning = tuple[Run, list[Tuned], list[tuple[str, int, int]]]


@pytest.mark.slow
def test_tuning(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, so that one worker tunes, and once."""
    made = Run(tmp_path)
    run = (made, *made.again())
    every_kernel_has_records_and_none_got_slower(run)
    the_command_measures_nothing_new(run, monkeypatch, capsys)
    a_second_call_measures_nothing_and_a_larger_one_goes_on(run)
    tuned_kernels_give_the_same_bits(run, rng, tmp_path)
    records_do_not_serve_another_batch(run, tmp_path)
    a_new_process_reads_the_records(run, tmp_path)
    what_ships_is_timed_again(run, monkeypatch, tmp_path)


def every_kernel_has_records_and_none_got_slower(run: Tuning) -> None:
    made, tuned, told = run
    assert {k.kernel for k in tuned} == {"bitserial_conv2d", "bitserial_conv2d_bits"}
    for kernel in tuned:
        assert 0 < kernel.best <= kernel.default < 1e6
        assert 1 <= kernel.trials <= TRIALS
    assert json.loads((made.records / "target.json").read_text()) == {
        "target": made.target.name,
        "threads": 1,
        "unit": "us",
    }
    assert len((made.records / "database_tuning_record.json").read_text().splitlines()) == sum(k.trials for k in tuned)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {total for *_, total in told} == {TRIALS * len(tuned)}
    assert told[-1][1] == TRIALS * len(tuned)


def a_second_call_measures_nothing_and_a_larger_one_goes_on(run: Tuning) -> None:
    made, tuned, _ = run
    before = files(made.records)
    again, _ = made.again()
    assert again == tuned
    assert files(made.records) == before
    more, told = made.again(TRIALS + 1)
    assert told[-1][1] == (TRIALS + 1) * len(tuned)
    for kernel, first in zip(more, tuned, strict=True):
        assert kernel.kernel == first.kernel
        assert kernel.default <= first.default  # a candidate may be the default schedule again
        assert kernel.best <= first.best
        assert first.trials <= kernel.trials <= TRIALS + 1
    for name, content in before.items():
        assert (made.records / name).read_bytes().startswith(content)


def tuned_kernels_give_the_same_bits(run: Tuning, rng: np.random.Generator, tmp_path: Path) -> None:
    made, tuned, _ = run
    plain = compile_network(made.model, tmp_path / "plain", made.target, 1)
    manifest = compile_network(made.model, tmp_path / "tuned", made.target, 1, records=made.records)
    assert plain.tuned_kernels == 0
    assert manifest.tuned_kernels == len(tuned)
    assert manifest.kernels == plain.kernels
    assert session.verify(tmp_path / "tuned").error == 0
    copied = {name for name in manifest.files if name.startswith("records/")}
    assert copied == {f"records/{name}" for name in files(made.records)}  # and no logs
    check_records(tmp_path / "tuned" / "records", made.target, 1)
    x = dyadic(rng, (1, 32, 8, 8))
    (expected,) = oracle(made.model).run(None, {"x": x})
    for name in ("plain", "tuned"):
        np.testing.assert_array_equal(Session(tmp_path / name).run({"x": x})["y"], expected)


def records_do_not_serve_another_batch(run: Tuning, tmp_path: Path) -> None:
    """Other shapes are other kernels."""
    made, _, _ = run
    manifest = compile_network(made.model, tmp_path / "two", made.target, 1, batch=2, records=made.records)
    assert manifest.tuned_kernels == 0
    assert session.verify(tmp_path / "two").error == 0


def a_new_process_reads_the_records(run: Tuning, tmp_path: Path) -> None:
    """They name tensor intrinsics, which this process has registered and a new one has not."""
    made, tuned, _ = run
    folder = tmp_path / "elsewhere"
    command = [sys.executable, "-m", "pipeline.cli", "compile", str(made.model), "-o", str(folder)]
    done = subprocess.run(
        [*command, "--records", str(made.records.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert artifact.read(folder).tuned_kernels == len(tuned)


def what_ships_is_timed_again(run: Tuning, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The times of the search choose who takes part, and those in turns who wins."""
    made, _, _ = run
    fields: list[int] = []

    def in_turns(timers: list[Any], threads: int, rounds: int) -> list[list[float]]:
        assert all(timer(1) > 0 for timer in timers)
        fields.append(len(timers))
        return [[factor**i] * rounds for i in range(len(timers))]

    monkeypatch.setattr(bench, "in_turns", in_turns)
    factor, kept = 2.0, tmp_path / "kept"
    networks = [compiler.lower(importer.load(made.model, 1, made.target))]
    assert tune.keep_best(made.records, kept, made.target, []) == 0  # none of its kernels is asked for
    assert tune.keep_best(made.records, kept, made.target, networks) == 0  # the default schedule comes first
    factor, winners = 0.5, fields[:]
    fields.clear()
    assert tune.keep_best(made.records, kept, made.target, networks) == sum(count > 1 for count in winners) > 0
    assert fields == winners
    records = compiler.open_records(kept, made.target).get_all_tuning_records()
    assert sorted(float(r.run_secs[0]) for r in records) == sorted(factor ** (n - 1) for n in winners if n > 1)
    manifest = compile_network(made.model, tmp_path / "shipped", made.target, 1, records=kept)
    assert manifest.tuned_kernels == len(records)
    assert session.verify(tmp_path / "shipped").error == 0


def the_command_measures_nothing_new(
    run: Tuning, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline import cli

    made, tuned, _ = run
    arguments = ["tune", str(made.model), "--trials", "1", "--records", str(made.records.parent), "--json"]
    before = files(made.records)
    monkeypatch.setattr("sys.argv", ["crossbit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [kernel["kernel"] for kernel in printed] == [kernel.kernel for kernel in tuned]
    assert [kernel["default"] for kernel in printed] == [kernel.default for kernel in tuned]
    assert files(made.records) == before


# Refusals, which measure nothing -----------------------------------------------------------------------------------


def records_for(folder: Path, target: str, threads: int) -> Path:
    folder.mkdir()
    (folder / "target.json").write_text(json.dumps({"target": target, "threads": threads}))
    return folder


def test_a_folder_belongs_to_a_target_and_its_threads() -> None:
    names = {
        records_folder(Path("records"), targets.load(name), threads) for name in targets.names() for threads in (1, 2)
    }
    assert len(names) == 2 * len(targets.names())
    assert Path("records/x86-avx2-4t") == records_folder(Path("records"), targets.load("x86-avx2"), 4)


@pytest.mark.parametrize(("target", "threads"), [("x86-avx2", 2), ("x86-avx512", 1), ("gone", 1)])
def test_records_of_another_target_or_thread_count_are_refused(
    target: str, threads: int, small_model: Path, tmp_path: Path
) -> None:
    folder, wanted = records_for(tmp_path / "records", target, threads), targets.load("x86-avx2")
    sentence = f"records: these records are for {target} with {threads} threads, not for x86-avx2 with 1"
    with pytest.raises(ValueError, match=sentence):
        check_records(folder, wanted, 1)
    with pytest.raises(ValueError, match=sentence):
        compile_network(small_model, tmp_path / "artifact", wanted, 1, records=folder)
    assert [f.name for f in tmp_path.iterdir()] == ["records"]


def test_tuning_does_not_touch_the_records_of_another_target(small_model: Path, tmp_path: Path) -> None:
    folder = records_for(tmp_path / "records", "gone", 1)
    lowered = compiler.lower(importer.load(small_model, 1, targets.host()))
    with pytest.raises(ValueError, match="these records are for gone with 1 threads"):
        tune.tune(lowered, targets.host(), 1, folder, 2, 0)
    assert [f.name for f in folder.iterdir()] == ["target.json"]


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no tuning records here; `crossbit tune` makes them"):
        check_records(tmp_path / "none", targets.host(), 1)


def test_a_target_that_does_not_run_here_is_not_measured(small_model: Path, tmp_path: Path) -> None:
    foreign = replace(targets.host(), features=targets.host().features | {"flying"})
    lowered = compiler.lower(importer.load(small_model, 1, targets.host()))
    with pytest.raises(ValueError, match=f"target {foreign.name} cannot be measured here: this machine lacks flying"):
        tune.tune(lowered, foreign, 1, tmp_path / "records", 2, 0)
    assert not (tmp_path / "records").exists()
