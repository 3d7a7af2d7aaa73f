"""The command line: exit codes, JSON, one sentence for bad input, and the whole way from pictures to a report."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_artifact import change, flipped, rehash

import targets
from pipeline import artifact, cli, cost_measured, quantizers, session, toolchain
from pipeline.bench import Profile


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Crossbit = Callable[..., Run]


@pytest.fixture
def crossbit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Crossbit:
    """The command in this process, on a terminal wide enough to break no line."""
    monkeypatch.setattr(cli, "out", Console(width=400))
    monkeypatch.setattr(cli, "err", Console(width=400, stderr=True))

    def run(*arguments: object) -> Run:  # not typer's runner: `main` is what makes sentences of exceptions
        monkeypatch.setattr(sys, "argv", ["crossbit", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


# From pictures to a report -----------------------------------------------------------------------------------------


def test_the_whole_way(crossbit: Crossbit, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "run" / "m16"
    trained = crossbit(
        "train", "digits", "-o", tuned, "--set", "train.epochs=1", "--set", "model.widths=[16, 40, 64]", "--json"
    )
    assert trained.code == 0
    assert trained.json == json.loads((tuned / "result.json").read_text())
    assert (trained.json["name"], trained.json["method"], len(trained.json["epochs"])) == ("m16", "1w1a/16", 1)

    exported = crossbit("export", tuned)
    assert (exported.code, exported.err) == (0, "")  # torch's exporter has much to say
    model = tuned / "model.onnx"
    assert f"{model.stat().st_size:,} bytes" in exported.out

    compiled = crossbit("compile", model, "-o", tuned / "library")
    assert compiled.code == 0
    manifest = artifact.read(tuned / "library")
    assert f"model.so {manifest.files['model.so'].bytes:,} bytes, {manifest.kernels} kernels, 0 of" in compiled.out

    verified = crossbit("verify", tuned / "library", "--data", "digits", "--json")
    assert verified.code == 0
    assert verified.json["passed"] is True
    assert verified.json == json.loads((tuned / "library.verify.json").read_text())
    # the float stem sums in another order than torch's, so that a sign may flip: in few of 450 pictures
    assert verified.json["accuracy"] == pytest.approx(trained.json["accuracy"], abs=0.01)

    timed = crossbit("bench", tuned / "library", "--onnx", model, "--rounds", 3, "-o", run / "bench.json", "--json")
    assert timed.code == 0
    assert timed.json == json.loads((run / "bench.json").read_text())

    reported = crossbit("report", run)
    assert reported.code == 0
    assert str(run / "report.html") in reported.out
    page = (run / "report.html").read_text()
    for number in (
        f"{100 * trained.json['accuracy']:.2f} %",
        f"{100 * verified.json['accuracy']:.2f} %",
        f"{model.stat().st_size:,}",
        f"{manifest.files['model.so'].bytes:,}",
        *(f"{layer.stored_bytes:,}" for layer in manifest.layers),
        *(f"{layer.binary_macs:,}" for layer in manifest.layers),
        *(f"{m['median_us']:.1f}" for m in timed.json["measurements"]),
    ):
        assert number in page
    for text in ("1w1a/16", "weights are float", manifest.target, targets.cpu_name(), "m16/library"):
        assert text in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3  # accuracy, size, latency
    assert all(base64.b64decode(p, validate=True).startswith(b"\x89PNG") for p in pictures)
    assert not re.search(r'(src|href)="?(https?:)?//', page), "the page is not self-contained"


# Output ------------------------------------------------------------------------------------------------------------


def test_inspect(crossbit: Crossbit, small_model: Path) -> None:
    found = crossbit("inspect", small_model, "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json["file_bytes"] == small_model.stat().st_size
    assert [layer["method"] for layer in found.json["layers"]] == ["float", "1w1a/16", "1w1a/16", "float"]
    table = crossbit("inspect", small_model)
    assert table.code == 0
    for layer in found.json["layers"]:
        assert f"{layer['stored_bytes']:,}" in table.out
    assert f"file {small_model.stat().st_size:,} bytes" in table.out


def test_inspect_an_artifact(crossbit: Crossbit, small_model: Path, small_artifact: Path, tmp_path: Path) -> None:
    of_file, of_artifact = (crossbit("inspect", path, "--json").json for path in (small_model, small_artifact))
    assert of_artifact["layers"] == of_file["layers"]
    assert of_artifact["library_bytes"] == (small_artifact / "model.so").stat().st_size
    assert "workspace_bytes" not in of_artifact
    assert crossbit("compile", small_model, "-o", tmp_path / "net", "--emit", "c-lib").code == 0
    of_library = crossbit("inspect", tmp_path / "net", "--json").json
    assert of_library["library_bytes"] == (tmp_path / "net/libnet.so").stat().st_size
    assert of_library["workspace_bytes"] >= of_library["workspace_bound"] > 0
    assert of_library["constant_bytes"] > sum(layer["stored_bytes"] for layer in of_library["layers"])
    assert f"workspace {of_library['workspace_bytes']:,} bytes" in crossbit("inspect", tmp_path / "net").out


def test_compiled_routes_are_verified_and_timed_side_by_side(
    crossbit: Crossbit, small_model: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("vm", "library", "source")]
    for folder, emit in zip(folders, ("vm", "c-lib", "c-source"), strict=True):
        done = crossbit("compile", small_model, "-o", folder, "--emit", emit, "--name", "net")
        assert done.code == 0, done.err
        assert crossbit("verify", folder, "--json").json["passed"]
    measured = crossbit("bench", *folders, "--rounds", 3, "--json").json["measurements"]
    assert [m["name"] for m in measured] == list(map(str, folders))
    assert crossbit("bench", folders[1], "--rounds", 3, "--profile").code == 2


def test_targets(crossbit: Crossbit) -> None:
    listed = crossbit("targets", "--json")
    assert (listed.code, listed.err) == (0, "")
    assert [record["name"] for record in listed.json] == targets.names()
    assert {*listed.json[0]} >= {"triple", "cpu", "features", "vector_bits", "registers", "popcount", "source"}
    table = crossbit("targets").out
    assert all(name in table for name in targets.names())
    (host,) = [line for line in table.splitlines() if re.search(r"\bhost\b", line)]
    assert targets.host().name in host


def test_methods(crossbit: Crossbit) -> None:
    listed = crossbit("methods", "--json")
    assert [method["name"] for method in listed.json] == [*quantizers.methods(), "stacked"]
    assert {"1w1a", "1w2a", "1w32a", "2w32a"} == {method["bits"] for method in listed.json}
    table = crossbit("methods").out
    assert all(method["source"] in table for method in listed.json)


PNG = b"\x89PNG\r\n\x1a\n"


def test_cost(crossbit: Crossbit, tmp_path: Path) -> None:
    layer = ("cost", "--channels", 256, "--kernel", 1, "--word", 512, "--group", 16)
    shown = crossbit(*layer, "--json", "--plot", tmp_path / "model.png")
    assert (shown.code, shown.err) == (0, "")
    rounded = {name: round(shown.json[name], 2) for name in ("speedup", "speedup_filterwise", "boundary")}
    assert rounded == {"speedup": 789.44, "speedup_filterwise": 202.89, "boundary": 8.73}
    assert round(shown.json["memory_ratio"], 2) == 31.75
    assert "measured" not in shown.json
    assert (tmp_path / "model.png").read_bytes().startswith(PNG)
    table = crossbit(*layer).out
    assert "789.44 x at M = 16, 202.89 x at M = 1" in table
    assert "operations counted, nothing timed" in table
    assert all(row["method"] in table for row in shown.json["methods"])


def test_cost_beside_measurements(crossbit: Crossbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [cost_measured.Point(c, 3, m, 50.0 * c, 25.0 * c, 10.0 * c, 5.0) for c in (64, 128) for m in (1, 4)]
    monkeypatch.setattr(cost_measured, "measure", lambda *_, **__: points)
    options = ("cost", "--group", 4, "--measure", "--plot", tmp_path / "both.png")
    shown = crossbit(*options, "--json")
    assert shown.json["measured"] == [dataclasses.asdict(point) for point in points]
    assert shown.json["cpu"] == targets.cpu_name()
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    table = crossbit(*options).out
    assert "measured, not modelled" in table
    assert "6400.0" in table


def test_similarity_and_conversion(crossbit: Crossbit, tmp_path: Path) -> None:
    run, shared, tuned = tmp_path / "run", tmp_path / "shared", tmp_path / "tuned"
    settings = ("--set", "train.epochs=1", "--set", "model.widths=[8, 12, 20]", "--set", "quantize.group=1")
    assert crossbit("train", "digits", "-o", run, *settings).code == 0

    found = crossbit("similarity", run, "--json", "--plot", tmp_path / "scales.png")
    assert (found.code, found.err) == (0, "")
    assert [(layer["name"], layer["filters"]) for layer in found.json] == [("2", 12), ("5", 20)]
    assert list(found.json[0]["relative_price"]) == ["1", "2", "4", "8", "12"]
    assert (tmp_path / "scales.png").read_bytes().startswith(PNG)
    table = crossbit("similarity", run).out
    assert f"{found.json[1]['relative_price']['20']:.2%}" in table

    budget = found.json[0]["relative_price"]["4"]
    converted = crossbit("convert", run, "-o", shared, "--budget", budget, "--plot", tmp_path / "chosen.png", "--json")
    assert (converted.code, converted.err) == (0, "")
    picked = {layer["name"]: layer["group"] for layer in converted.json}
    assert picked["2"] == max(int(m) for m, price in found.json[0]["relative_price"].items() if price <= budget)
    assert (tmp_path / "chosen.png").read_bytes().startswith(PNG)
    again = crossbit("convert", run, "-o", shared, "--group", 2)
    assert (again.code, "exists: give another" in again.err) == (2, True)

    trained = crossbit("train", "digits", "-o", tuned, "--start", shared, "--set", "train.epochs=1", "--json")
    assert trained.code == 0
    assert (trained.json["method"], len(trained.json["epochs"])) == ("1w1a/mixed", 1)
    assert crossbit("export", tuned).code == 0

    assert crossbit("export", run).code == 0
    written = crossbit("convert", run / "model.onnx", "-o", tmp_path / "shared.onnx", "--group", 4)
    assert f"converted {tmp_path / 'shared.onnx'}" in written.out
    refused = crossbit("similarity", tmp_path / "shared.onnx")
    assert (refused.code, "layer '2' has one scale for 4 filters and not those of each" in refused.err) == (2, True)


def test_verify(crossbit: Crossbit, small_artifact: Path) -> None:
    verified = crossbit("verify", small_artifact, "--json")
    assert (verified.code, verified.err) == (0, "")
    verdict = session.verify(small_artifact)
    assert verified.json == {"target": verdict.target, "error": verdict.error, "limit": verdict.limit, "passed": True}
    assert crossbit("verify", small_artifact).out.startswith(f"verified {small_artifact}: largest error ")


def test_verify_of_an_artifact_that_differs_ends_with_1(crossbit: Crossbit, copied: Path) -> None:
    inputs, outputs = artifact.golden(copied)
    outputs["y"] += 1
    artifact.save_golden(copied / "golden.npz", inputs, outputs)
    rehash(copied, "golden.npz")
    verified = crossbit("verify", copied)
    assert (verified.code, verified.err) == (1, "")
    assert verified.out.startswith(f"differs {copied}: largest error 1")
    as_json = crossbit("verify", copied, "--json")
    assert (as_json.code, as_json.json["passed"]) == (1, False)


def test_bench_with_a_profile(
    crossbit: Crossbit, small_artifact: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bench.json"
    timed = crossbit("bench", small_artifact, "--rounds", 3, "--profile", "--json", "-o", file)
    assert timed.code == 0
    found = Profile.model_validate(timed.json["profile"])
    assert {k: v for k, v in timed.json.items() if k != "profile"} == json.loads(file.read_text())
    assert [kernel.kernel.split()[1] for kernel in found.kernels] == [
        call.kernel for call in artifact.read(small_artifact).calls
    ]
    table = crossbit("bench", small_artifact, "--onnx", small_model, "--rounds", 3, "--profile").out
    assert "onnxruntime" in table
    for kernel in found.kernels:
        (line,) = (line for line in table.splitlines() if kernel.kernel in line)
        assert f" {kernel.bytes:,} " in line
        assert f" {kernel.macs / 1e6:.2f} M " in line or not kernel.macs
    assert "ceiling: binary " in table and " G MAC/s, float " in table
    monkeypatch.setattr(toolchain, "_installed", lambda _: iter(()))
    assert "\nceiling: no C compiler" in crossbit("bench", small_artifact, "--rounds", 3, "--profile").out


def test_compile_for_a_named_target_and_batch(crossbit: Crossbit, small_model: Path, tmp_path: Path) -> None:
    for name in [n for n in targets.names() if n != targets.host().name][:2]:
        done = crossbit("compile", small_model, "-o", tmp_path / name, "-t", name, "--batch", 2, "--threads", 2)
        assert done.code == 0
        found = artifact.read(tmp_path / name)
        assert (found.target, found.threads, found.inputs[0].shape) == (name, 2, (2, 1, 8, 8))


# Bad input ---------------------------------------------------------------------------------------------------------


def no_file(_: Path) -> None:
    pass


def text_file(folder: Path) -> None:
    (folder / "model.onnx").write_text("hello")


def foreign_result(folder: Path) -> None:
    (folder / "result.json").write_text('{"score": 1}')


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"short_name": "an app"}')


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("inspect model.onnx", no_file, "model.onnx: there is no such file"),
    ("inspect model[/x].onnx", no_file, "model[/x].onnx: there is no such file"),
    ("inspect model.onnx", text_file, "model.onnx: not a valid ONNX model"),
    ("inspect .", no_file, "not an artifact (it has no manifest.json); `crossbit compile` makes one"),
    ("compile model.onnx -o new", no_file, "model.onnx: there is no such file"),
    ("compile model.onnx -o new", text_file, "model.onnx: not a valid ONNX model"),
    ("compile SMALL -o new -t x86-avx", no_file, "there is no target 'x86-avx': did you mean x86-avx2"),
    ("compile SMALL -o model.onnx", text_file, "model.onnx: exists and is no artifact; give another folder, or remove"),
    ("compile SMALL -o new --records gone", no_file, "no tuning records here; `crossbit tune` makes them"),
    ("tune model.onnx --records gone", no_file, "model.onnx: there is no such file"),
    ("verify new", no_file, "new: not an artifact (it has no manifest.json); `crossbit compile` makes one"),
    ("verify ARTIFACT --data nothing", no_file, "there is no data set 'nothing': choose one of digits"),
    ("bench new", no_file, "new: not an artifact"),
    ("bench ARTIFACT --threads 2", no_file, "compiled for 1 threads, asked to time 2"),
    ("bench ARTIFACT --onnx model.onnx", no_file, "model.onnx: there is no such file"),
    ("bench ARTIFACT --onnx model.onnx", text_file, "model.onnx: not a valid ONNX model"),
    ("report .", no_file, "holds no result.json, bench.json or manifest.json; train, compile or bench first"),
    ("report .", foreign_result, "result.json: this crossbit did not write it; move it out of the folder"),
    ("report .", foreign_manifest, "manifest.json: this crossbit did not write it; move it out of the folder"),
    ("export new", no_file, "there is no such checkpoint, make one with `crossbit train`"),
    ("train nothing -o new", no_file, "there is no recipe 'nothing': give a .toml file or one of cifar10, digits"),
    ("train digits -o new --set epochs=1", no_file, "--set epochs=1: write section.field=value, with a section of mod"),
    ("train digits -o new --set train.epochs", no_file, "--set train.epochs: write section.field=value"),
    ("train digits -o new --set train.epochs=0", no_file, "train.epochs = 0"),
    ("train digits -o new --set model.colour=red", no_file, "model.colour does not exist: choose from"),
    ("train digits -o new --resume", no_file, "there is no such checkpoint, make one with `crossbit train`"),
    ("train cifar10 -o new", no_file, "the data set 'cifar10' needs its files: with --data PATH"),
]


@pytest.mark.parametrize(("command", "prepare", "sentence"), WRONG, ids=[f"{c} {p.__name__}" for c, p, _ in WRONG])
def test_bad_input_is_one_sentence_and_exit_code_2(
    command: str,
    prepare: Callable[[Path], None],
    sentence: str,
    crossbit: Crossbit,
    small_model: Path,
    small_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = {"SMALL": small_model, "ARTIFACT": small_artifact}
    result = crossbit(*(words.get(word, word) for word in command.split()))
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("spoilt", ["flipped", "other schema"])
def test_a_spoilt_artifact_is_one_sentence(spoilt: str, crossbit: Crossbit, copied: Path) -> None:
    if spoilt == "flipped":
        flipped(copied, "model.so")
    else:
        change(copied, schema_version=9)
    for command in ("verify", "bench"):
        result = crossbit(command, copied)
        assert (result.code, result.out) == (2, "")
        assert re.fullmatch(rf"error: {copied}/.*; compile again( with this crossbit)?\n", result.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile",),
        ("compile", "model.onnx"),
        ("bench",),
        ("nothing",),
        ("compile", "model.onnx", "-o", "new", "--threads", "0"),
        ("compile", "model.onnx", "-o", "new", "--batch", "-1"),
        ("bench", "new", "--rounds", "many"),
        ("inspect", "model.onnx", "--colour"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], crossbit: Crossbit) -> None:
    result = crossbit(*arguments)
    assert (result.code, result.out) == (2, "")
    assert re.search(r"^Usage: .*crossbit", result.err)
    assert "Traceback" not in result.err


def test_ctrl_c_ends_with_130(crossbit: Crossbit, small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "verify", interrupted)
    result = crossbit("verify", small_artifact)
    assert result.code == 130
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["train", "export", "inspect", "compile", "tune", "verify", "bench", "report"])
def test_help_has_an_example_that_parses(command: str, crossbit: Crossbit) -> None:
    result = crossbit(command, "--help")
    assert result.code == 0
    assert f"Example: crossbit {command} " in result.out


# As a process ------------------------------------------------------------------------------------------------------


def test_a_board_verifies_and_benches_without_torch_and_onnx(small_artifact: Path) -> None:
    """Only what the base install brings, and no other output than the command's."""
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'sklearn', 'scipy', 'xgboost'):\n"
        "    sys.modules[name] = None\n"
        "from pipeline.cli import main\n"
        "main()\n"
    )
    verified = subprocess.run(
        [sys.executable, "-c", script, "verify", small_artifact, "--json"], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    assert json.loads(verified.stdout)["passed"] is True
    timed = subprocess.run(
        [sys.executable, "-c", script, "bench", small_artifact, "--rounds", "3", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (timed.returncode, timed.stderr) == (0, "")
    assert json.loads(timed.stdout)["measurements"][0]["median_us"] > 0


@pytest.mark.parametrize(("extra", "module"), [(e, m) for e, modules in cli._EXTRAS.items() for m in modules])
def test_what_an_extra_brings_is_named(
    extra: str, module: str, crossbit: Crossbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of the extras is that of pyproject.toml, and a command without one says which."""
    (distribution,) = set(importlib.metadata.packages_distributions()[module])
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    brought = project["optional-dependencies"][extra]
    assert any(re.match(rf"{distribution}\b(?!-)", requirement, re.IGNORECASE) for requirement in brought)

    def without(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named '{module}.part'", name=f"{module}.part")

    monkeypatch.setattr(targets, "names", without)
    result = crossbit("targets")
    assert result.code == 2
    assert result.err == f"error: this command needs {module}: run `pip install '.[{extra}]'` in crossbit's folder\n"


def test_an_unknown_missing_module_is_a_fault(crossbit: Crossbit, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'pipeline.gone'", name="pipeline.gone")

    monkeypatch.setattr(targets, "names", without)
    with pytest.raises(ModuleNotFoundError, match=r"pipeline\.gone"):
        crossbit("targets")


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("crossbit")
    result = subprocess.run([command, "targets", "--json"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert [record["name"] for record in json.loads(result.stdout)] == targets.names()
