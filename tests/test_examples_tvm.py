"""The C++ example on the TVM runtime: built as its README says, it predicts what the Python session does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_artifact import change

import targets
from pipeline import data, recipe, train
from pipeline.export import export
from pipeline.packaging import compile_network
from pipeline.session import Session

SOURCE = Path(__file__).parents[1] / "examples" / "cpp_tvm"

pytestmark = [
    pytest.mark.slow,  # trains, compiles, builds
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of three pictures a call, trained for an epoch so that it predicts many labels."""
    folder = tmp_path_factory.mktemp("digits")
    tables = recipe.load("digits").model_dump()
    tables["train"]["epochs"] = 1
    tables["model"]["widths"] = (16, 40, 64)
    train.train(recipe.parse(tables, "a short recipe"), data.load("digits"), folder)
    trained = train.load(folder)
    export(trained.model, trained.image_shape, folder / "model.onnx")
    compile_network(folder / "model.onnx", folder / "lib", targets.host(), threads=1, batch=3)
    return folder / "lib"


def configure(artifact: Path, build: Path) -> subprocess.CompletedProcess[str]:
    options = (f"-DARTIFACT={artifact}", f"-DPython_EXECUTABLE={sys.executable}")
    return subprocess.run(["cmake", "-S", SOURCE, "-B", build, *options], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def app(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program."""
    build = tmp_path_factory.mktemp("build")
    configured = configure(digits, build)
    assert configured.returncode == 0, configured.stderr
    built = subprocess.run(["cmake", "--build", build], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    return build / "app"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Digits of the test half, in any order."""
    images = data.to_float(data.load("digits").test.images).numpy()
    return np.ascontiguousarray(images[rng.choice(len(images), count, replace=False)])


@pytest.mark.parametrize("options", [(), ("--threads", 1), ("--threads", 4), ("--threads", 64)])
def test_labels_are_the_sessions(
    options: tuple[object, ...], app: Path, digits: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    images = pictures(rng, 120)
    images.astype("<f4").tofile(tmp_path / "images.f32")
    session = Session(digits)
    outputs = np.concatenate([session.run({"x": images[i : i + 3]})["y"] for i in range(0, len(images), 3)])
    found = run(app, digits, tmp_path / "images.f32", *options)
    assert (found.returncode, found.stderr) == (0, "")
    labels = [int(line) for line in found.stdout.splitlines()]
    assert labels == outputs.argmax(1).tolist()
    assert len(set(labels)) > 3


@pytest.mark.parametrize("size", [0, 3, 4 * 64, 3 * 4 * 64 - 1, 4 * 4 * 64])
def test_a_file_of_another_size_is_refused(size: int, app: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "images.f32").write_bytes(bytes(size))
    refused = run(app, digits, tmp_path / "images.f32", "--threads", 2)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: {tmp_path}/images.f32: {size} bytes, and a call takes {3 * 4 * 64}; "
        "write whole images of the network's size\n"
    )


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no artifact", "model.so: No such file or directory"),
        ("no images", "No such file or directory [{}/images.f32]"),
        ("images that are a folder", "Is a directory [{}/images.f32]"),
        ("another library", "model.so: 100 bytes, this program was built for one of "),
        ("a spoilt library", "Failed to load dynamic shared library"),
    ],
)
def test_what_is_missing_is_named(what: str, sentence: str, app: Path, digits: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "artifact", tmp_path / "images.f32"
    size = (digits / "model.so").stat().st_size
    if what != "no artifact":
        shutil.copytree(digits, folder)
    if what == "images that are a folder":
        file.mkdir()
    elif what != "no images":
        file.write_bytes(bytes(3 * 4 * 64))
    if what == "another library":
        os.truncate(folder / "model.so", 100)
    elif what == "a spoilt library":
        (folder / "model.so").write_bytes(b"\x7fELF" + bytes(size - 4))
    refused = run(app, folder, file)
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and sentence.format(tmp_path) in line


@pytest.mark.parametrize(
    "arguments", [[], ["a"], ["a", "b", "--threads"], ["a", "b", "--threads", "0"], ["a", "b", "--cores", "2"]]
)
def test_wrong_usage(arguments: list[str], app: Path) -> None:
    refused = run(app, *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "<artifact folder> <images.f32> [--threads N]" in refused.stderr


# What the program was built for ------------------------------------------------------------------------------------


def test_a_cpu_without_a_feature_is_refused(digits: Path, app: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(digits, tmp_path / "copied"))
    change(copied, features=[*json.loads((copied / "manifest.json").read_text())["features"], "no_such_feature"])
    build = tmp_path / "build"
    assert configure(copied, build).returncode == 0
    assert run("cmake", "--build", build).returncode == 0
    refused = run(build / "app", copied, tmp_path / "images.f32")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"error: {copied}/model.so: this CPU lacks no_such_feature\n"


def test_an_artifact_that_does_not_fit_the_example_is_refused(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    change(copied, outputs=manifest["outputs"] * 2)
    for folder, sentence in ((copied, "the network has 2\n  outputs"), (tmp_path / "none", "is not an artifact")):
        refused = configure(folder, tmp_path / "build")
        assert refused.returncode == 1
        assert " ".join(sentence.split()) in " ".join(refused.stderr.split())
