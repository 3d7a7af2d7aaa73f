"""Every example, built as its README says in a copy of its folder: the same labels as the network in Python."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machines
import numpy as np
import pytest
from torch import nn

import targets
from pipeline import data, models, recipe, toolchain, train
from pipeline.export import export
from pipeline.packaging import Emit, compile_network
from pipeline.session import Session

EXAMPLES = Path(__file__).parents[1] / "examples"
HOST = targets.host().name
Compiled = Callable[..., Path]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the recipe after three epochs, a few seconds: an ONNX file."""
    folder = tmp_path_factory.mktemp("digits")
    settings = recipe.load("digits")
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 3})})
    train.train(settings, data.load("digits"), folder)
    trained = train.load(folder)
    export(trained.model, trained.image_shape, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def compiled(digits: Path) -> Compiled:
    """compiled(emit, target): the digits network as a folder, made once. Read it, do not write to it."""

    def make(emit: Emit, target: str = HOST) -> Path:
        folder = digits.parent / f"{emit}-{target}"
        if not folder.exists():
            compile_network(digits, folder, targets.load(target), threads=1, emit=emit, name="digits")
        return folder

    return make


@pytest.fixture
def images(digits: Path, rng: np.random.Generator, compiled: Compiled, tmp_path: Path) -> Path:
    """A folder of random digits that the network was not trained on: images.bin, images.h, and the labels in Python."""
    test = data.load("digits").test
    chosen = rng.choice(len(test.labels), 40, replace=False)
    pictures = data.to_float(test.images[chosen]).numpy()
    guesses = labels(compiled("vm"), pictures)
    assert np.mean(guesses == test.labels[chosen].numpy()) > 0.8  # of 40; about 0.97 of all
    write_images(pictures, guesses, tmp_path / "images")
    return tmp_path / "images"


def labels(artifact: Path, pictures: np.ndarray) -> np.ndarray:
    session = Session(artifact)
    return np.array([session.run({"x": picture[None]})["y"].argmax() for picture in pictures])


def write_images(pictures: np.ndarray, guesses: np.ndarray, folder: Path) -> None:
    """By the script of the examples."""
    spec = importlib.util.spec_from_file_location("images", EXAMPLES / "images.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(pictures, guesses, folder)


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / name, tmp_path / name))


def need(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is missing: `scripts/setup cross` as root installs it")


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def fails(*command: object, cwd: Path) -> str:
    """What a command says that must fail."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode > 0
    return done.stderr


# C -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emit", ["c-lib", "c-source"])
@pytest.mark.parametrize("target", [HOST, "cortex-a53", "cortex-a7"])
def test_c(target: str, emit: Emit, compiled: Compiled, images: Path, tmp_path: Path) -> None:
    need("make")
    machine = targets.load(target)
    machines.need(machine)
    folder = copy("c", tmp_path)
    compiler, *flags = toolchain.find(machine).cc
    variables = (f"CC={compiler}", f"CFLAGS=-O2 -Werror {' '.join(flags)}")
    run("make", f"NETWORK={compiled(emit, target)}", *variables, cwd=folder)
    done = machines.run(machine, folder / "classify", str(images / "images.bin"))
    assert done.returncode == 0, done
    assert done.stdout == (images / "labels.txt").read_text()


def test_c_with_the_shared_library(compiled: Compiled, images: Path, tmp_path: Path) -> None:
    need("make", "cc")
    folder, network = copy("c", tmp_path), compiled("c-lib")
    run("make", f"NETWORK={network}", f"LIBRARY={network}/libdigits.so", f"LDFLAGS=-Wl,-rpath,{network}", cwd=folder)
    assert run(folder / "classify", images / "images.bin") == (images / "labels.txt").read_text()


def test_c_reports_what_is_wrong(compiled: Compiled, images: Path, tmp_path: Path) -> None:
    need("make", "cc")
    folder = copy("c", tmp_path)
    run("make", f"NETWORK={compiled('c-lib')}", cwd=folder)
    assert "usage" in fails("./classify", cwd=folder)
    assert "No such file" in fails("./classify", "nothing.bin", cwd=folder)
    (folder / "cut.bin").write_bytes((images / "images.bin").read_bytes()[:-1])
    assert "ends inside an image: 255 bytes are left, an image has 256" in fails("./classify", "cut.bin", cwd=folder)


def test_c_recognises_digits(digits: Path, compiled: Compiled, tmp_path: Path) -> None:
    need("make", "cc")
    test = data.load("digits").test
    write_images(data.to_float(test.images).numpy(), test.labels.numpy(), tmp_path / "images")
    folder = copy("c", tmp_path)
    run("make", f"NETWORK={compiled('c-lib')}", cwd=folder)
    assert accuracy(run(folder / "classify", tmp_path / "images" / "images.bin"), test.labels.numpy()) > 0.9


def accuracy(printed: str, truth: np.ndarray) -> float:
    guesses = np.array(printed.split(), int)
    assert guesses.shape == truth.shape
    return float(np.mean(guesses == truth))


# C++ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("emit", "shared"), [("c-lib", "OFF"), ("c-lib", "ON"), ("c-source", "OFF")])
def test_cpp(emit: Emit, shared: str, compiled: Compiled, images: Path, tmp_path: Path) -> None:
    program = cmake(copy("cpp", tmp_path), compiled(emit), f"-DSHARED={shared}") / "classify"
    for threads in (1, 3, 64):
        assert run(program, images / "images.bin", threads) == (images / "labels.txt").read_text()


@pytest.mark.parametrize("emit", ["c-lib", "c-source"])
def test_the_cmake_package_can_be_found_again_and_again(emit: Emit, compiled: Compiled, tmp_path: Path) -> None:
    copy("cpp", tmp_path)
    (tmp_path / "other").mkdir()
    found = "find_package(digits CONFIG REQUIRED)\n"
    (tmp_path / "other" / "CMakeLists.txt").write_text(
        f"{found}{found}add_executable(digits other.cc)\ntarget_link_libraries(digits PRIVATE digits::digits)\n"
    )
    (tmp_path / "other" / "other.cc").write_text(
        '#include "digits.h"\nint main() { return digits_model.inputs - 1; }\n'
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(all LANGUAGES CXX)\n"
        "add_subdirectory(other)\nadd_subdirectory(cpp)\n"
    )
    build = cmake(tmp_path, compiled(emit))
    run(build / "other" / "digits")
    assert "usage" in fails(build / "cpp" / "classify", cwd=build)


def cmake(folder: Path, network: Path, *options: str) -> Path:
    """The build folder."""
    need("cmake", "c++", "make")
    build = folder / "build"
    warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    run("cmake", "-S", folder, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-Ddigits_DIR={network}", warnings, *options)
    run("cmake", "--build", build)
    return build


@pytest.mark.slow
@pytest.mark.parametrize("emit", ["c-lib", "c-source"])
def test_threads_share_a_call(emit: Emit, seed: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """A network that is large enough to have parallel loops; scores that are nearly equal are no labels to compare."""
    shape = (3, 32, 32)
    network: nn.Module = models.build("vgg_small", shape, 10, models.Quantize(group=16), widths=(64, 64, 128))
    export(network, shape, tmp_path / "model.onnx")
    for kind, folder in (("vm", "vm"), (emit, "network")):
        compile_network(tmp_path / "model.onnx", tmp_path / folder, targets.host(), threads=2, emit=kind, name="digits")
    if emit == "c-source":
        assert "share(pool, digits_" in (tmp_path / "network" / "digits.c").read_text()
    pictures = rng.standard_normal((12, *shape)).astype(np.float32)
    session = Session(tmp_path / "vm")
    scores = np.sort([session.run({"x": picture[None]})["y"][0] for picture in pictures])
    clear = pictures[scores[:, -1] - scores[:, -2] > 1e-3]
    guesses = labels(tmp_path / "vm", clear)
    write_images(clear, guesses, tmp_path / "images")
    program = cmake(copy("cpp", tmp_path), tmp_path / "network") / "classify"
    assert run(program, tmp_path / "images" / "images.bin") == (tmp_path / "images" / "labels.txt").read_text()


# Python ------------------------------------------------------------------------------------------------------------


def test_python_needs_numpy_alone(compiled: Compiled, images: Path, tmp_path: Path) -> None:
    folder = copy("python", tmp_path)
    for file in ("digits.py", "libdigits.so"):
        shutil.copy(compiled("c-lib") / file, folder)
    command = [sys.executable, "-X", "importtime", folder / "classify.py", images / "images.bin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (images / "labels.txt").read_text()
    imported = set(re.findall(r"\| +(\w+)", done.stderr))
    assert "numpy" in imported
    assert not imported & {"tvm", "tvm_ffi", "torch", "onnx", "onnxruntime", "scipy", "pipeline", "targets", "tvm_ops"}


def test_python_refuses_the_library_of_another_network(compiled: Compiled, small_model: Path, tmp_path: Path) -> None:
    folder = copy("python", tmp_path)
    compile_network(small_model, tmp_path / "other", targets.host(), threads=1, emit="c-lib", name="digits")
    shutil.copy(compiled("c-lib") / "digits.py", folder)
    code = "import digits; digits.Network()"
    assert "libdigits.so cannot be loaded" in fails(sys.executable, "-c", code, cwd=folder)
    shutil.copy(tmp_path / "other" / "libdigits.so", folder)
    error = fails(sys.executable, "-c", code, cwd=folder)
    assert error.endswith("libdigits.so belongs to another digits.py: take both from one folder\n")


# Cortex-M ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", ["m4", "m7", "m55"])
def test_cortex_m(cpu: str, compiled: Compiled, images: Path, tmp_path: Path) -> None:
    network = compiled("c-source", f"cortex-{cpu}")
    *guesses, stack = cortex_m(copy("cortex_m", tmp_path), cpu, network, images).splitlines()
    assert guesses == (images / "labels.txt").read_text().splitlines()
    assert 64 < int(re.fullmatch(r"stack: (\d+) bytes", stack)[1]) < 1024  # type: ignore[index]


def test_cortex_m4_recognises_digits(compiled: Compiled, rng: np.random.Generator, tmp_path: Path) -> None:
    test = data.load("digits").test
    write_images(data.to_float(test.images).numpy(), test.labels.numpy(), tmp_path / "images")
    network = compiled("c-source", "cortex-m4")
    printed = cortex_m(copy("cortex_m", tmp_path), "m4", network, tmp_path / "images")
    assert accuracy(printed[: printed.index("stack")], test.labels.numpy()) > 0.9


def cortex_m(folder: Path, cpu: str, network: Path, images: Path) -> str:
    need("make", "arm-none-eabi-gcc", "qemu-system-arm")
    variables = (f"CPU={cpu}", f"NETWORK={network}", f"IMAGES={images}")
    return run("make", "-s", "run", *variables, cwd=folder)


@pytest.mark.parametrize(("size", "region"), [("RAM_SIZE=16K", "RAM"), ("FLASH_SIZE=32K", "FLASH")])
def test_what_does_not_fit_a_cortex_m_does_not_link(
    size: str, region: str, compiled: Compiled, images: Path, tmp_path: Path
) -> None:
    need("make", "arm-none-eabi-gcc")
    network = compiled("c-source", "cortex-m4")
    error = fails("make", f"NETWORK={network}", f"IMAGES={images}", size, cwd=copy("cortex_m", tmp_path))
    assert f"region `{region}' overflowed" in error


# WebAssembly -------------------------------------------------------------------------------------------------------


def test_wasm(compiled: Compiled, images: Path, tmp_path: Path) -> None:
    need("make", "node")
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is missing: pip install ziglang")
    folder = copy("wasm", tmp_path)
    run("make", f"NETWORK={compiled('c-source', 'wasm32')}", f"ZIG={sys.executable} -m ziglang", cwd=folder)
    assert run("node", folder / "classify.mjs", images / "images.bin") == (images / "labels.txt").read_text()
    imports = (
        "console.log(WebAssembly.Module.imports(new WebAssembly.Module(require('fs').readFileSync('classify.wasm'))))"
    )
    assert run("node", "-e", imports, cwd=folder) == "[]\n"
