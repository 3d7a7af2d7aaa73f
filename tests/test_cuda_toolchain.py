"""Which nvcc is found, what it makes here, without a GPU, and how such libraries are refused where they cannot run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import cuda_machine
import numpy as np
import pytest
from torch import nn

import targets
from pipeline import artifact, cli, cuda_toolchain, session
from pipeline.export import export
from pipeline.packaging import compile_network

NVCC = """\
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.4, V12.4.131"; else
for arch in {}; do echo $arch; done; fi"""


def nvcc(folder: Path, architectures: str) -> Path:
    """A compiler that only says what it knows."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{NVCC.format(architectures)}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An x86-64 machine without NVIDIA's wheels and toolkits; its PATH is a folder with g++."""
    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cuda_toolchain, "_PREFIX", str(tmp_path / "prefix"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    folder = tmp_path / "path" / "bin"
    folder.mkdir(parents=True)
    (folder / "g++").write_text("#!/bin/sh\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return tmp_path


# What is found -----------------------------------------------------------------------------------------------------


def test_without_nvcc_the_sentence_names_the_extra_and_the_toolkit(bare: Path) -> None:
    with pytest.raises(ValueError, match=r"no nvcc for sm_80 .*pip install '\.\[cuda\]'.*toolkit.*CUDA_PATH"):
        cuda_toolchain.find(targets.load("cuda-sm80"))


def test_the_first_that_knows_the_gpu_is_taken(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = nvcc(bare / "path", "sm_75 sm_80 sm_90")
    assert cuda_toolchain.find(targets.load("cuda-sm80")).path == on_path
    in_variable = nvcc(bare / "toolkit", "sm_80 sm_100")
    monkeypatch.setenv("CUDA_PATH", str(bare / "toolkit"))
    found = cuda_toolchain.find(targets.load("cuda-sm80"))
    assert (found.path, found.name, found.architectures) == (in_variable, "nvcc 12.4.131", ("sm_80", "sm_100"))
    assert cuda_toolchain.find(targets.load("cuda-sm75")).path == on_path
    with pytest.raises(ValueError, match=r"no nvcc for sm_120 .*nvcc 12\.4\.131 .*knows sm_80, sm_100.*'\.\[cuda\]"):
        cuda_toolchain.find(targets.load("cuda-sm120"))


def test_wheels_come_first(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(bare / "path", "sm_80")
    wheel = nvcc(bare / "wheels" / "cu13", "sm_80")

    class Spec:
        submodule_search_locations = (str(bare / "wheels"),)

    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda name: Spec if name == "nvidia" else None)
    assert cuda_toolchain.find(targets.load("cuda-sm80")).path == wheel


def test_another_machine_beside_the_gpu_is_refused(bare: Path) -> None:
    with pytest.raises(ValueError, match=r"cuda-sm87 has aarch64 beside its GPU.*x86_64, this machine: compile there"):
        cuda_toolchain.find(targets.load("cuda-sm87"))


def test_without_a_host_compiler(bare: Path) -> None:
    nvcc(bare / "path", "sm_80")
    (bare / "path" / "bin" / "g++").unlink()
    with pytest.raises(ValueError, match=r"nvcc compiles with g\+\+.*apt-get install g\+\+"):
        cuda_toolchain.find(targets.load("cuda-sm80"))


# What it makes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "model.onnx"
    network = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten()).eval()
    export(network, (4, 8, 8), path)
    return path


@pytest.fixture(scope="module")
def library(model: Path) -> Path:
    """A C library for cuda-sm80."""
    target = targets.load("cuda-sm80")
    cuda_machine.need_nvcc(target)
    compile_network(model, model.parent / "library", target, 1, emit="c-lib", name="net")
    return model.parent / "library"


def test_a_library_has_machine_code_for_every_gpu_alike(model: Path, tmp_path: Path) -> None:
    target = targets.load("cuda-sm80")
    compiler = cuda_machine.need_nvcc(target)
    made = compile_network(model, tmp_path / "made", target, 1)
    assert {"sm_80", "sm_86", "sm_89", "sm_90"} == set(made.gpus)
    code = compiler.machine_code(tmp_path / "made" / made.library)
    kernels = {kernel for _, kernel in code}
    assert set(code) == {(arch, kernel) for arch in made.gpus for kernel in kernels}
    assert len(kernels) >= made.kernels
    assert all("STG" in listing for listing in code.values())
    assert compile_network(model, tmp_path / "made", targets.load("cuda-sm75"), 1).gpus == ("sm_75",)


def test_architectures_share_kernels_that_fit_their_memory() -> None:
    sm80, sm86 = targets.load("cuda-sm80"), targets.load("cuda-sm86")
    everywhere = ("sm_80", "sm_86", "sm_89", "sm_90")
    assert targets.architectures(sm80, 48 << 10) == targets.architectures(sm86, 99 << 10) == everywhere
    assert targets.architectures(sm80, 100 << 10) == ("sm_80", "sm_90")
    assert targets.architectures(targets.load("cuda-sm100"), 0) == ("sm_100", "sm_120")
    assert targets.architectures(targets.load("cuda-sm87"), 0) == ("sm_87",)


def test_what_nvcc_refuses_is_a_sentence(tmp_path: Path) -> None:
    compiler = cuda_machine.need_nvcc(targets.load("cuda-sm80"))
    with pytest.raises(ValueError, match=r"nvcc [\d.]+ failed \(\d+\): .*undefined_name"):
        compiler.compile("__global__ void f() { undefined_name; }", tmp_path / "f.o", ["sm_80"])


def test_a_c_library_needs_no_cuda_library_and_no_tvm(library: Path) -> None:
    def listed(*options: str) -> str:
        return subprocess.run(["readelf", "-W", *options, library / "libnet.so"], capture_output=True, text=True).stdout

    needed = re.findall(r"NEEDED.*\[(.*)\]", listed("-d"))
    assert needed and all(re.match(r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so|ld-linux", name) for name in needed)
    exported = {
        line.split()[-1]
        for line in listed("--dyn-syms").splitlines()
        if " GLOBAL DEFAULT " in line and " UND " not in line
    }
    assert exported == {f"net_{name}" for name in ("run_with", "run_once_with", "load_with", "strerror", "model")}


def test_a_c_library_says_what_it_lacks(library: Path) -> None:
    """Without a driver, in a process without crossbit."""
    if targets.capability() is not None:
        pytest.skip("this machine has a GPU")
    code = "import numpy as np, net; net.Network().run({'x': np.zeros((1, 4, 8, 8), np.float32)})"
    done = subprocess.run([sys.executable, "-c", code], cwd=library, capture_output=True, text=True, check=False)
    assert done.returncode
    assert re.search(r"RuntimeError: net: (CUDA driver version is insufficient|no CUDA-capable device)", done.stderr)


def test_the_static_library_links_an_app(library: Path, tmp_path: Path) -> None:
    """With the CUDA runtime of the toolkit, as <name>-config.cmake says."""
    compiler = cuda_machine.need_nvcc(targets.load("cuda-sm80"))
    (tmp_path / "app.c").write_text(
        '#include <stdio.h>\n#include "net.h"\n'
        "int main(void) {\n"
        "  static float x[NET_X_ELEMENTS], y[sizeof(float[64])];\n"
        '  printf("%d %d %s\\n", net_load(NULL, NULL), net_model.inputs, net_strerror(net_run_once(x, y)));\n'
        "  return 0;\n}\n"
    )
    libraries = [f"-L{compiler.path.parents[1] / 'lib'}", f"-L{compiler.path.parents[1] / 'lib64'}"]
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{library}", "-o", f"{tmp_path}/app"]
    config = (library / "net-config.cmake").read_text()
    (named,) = re.findall(r'LINK_LIBRARIES "(.*)"', config)
    names = [f"-l{name}" for name in named.split(";")]
    subprocess.run(["gcc", *flags, f"{tmp_path}/app.c", f"{library}/libnet.a", *libraries, *names], check=True)
    done = subprocess.run([f"{tmp_path}/app"], capture_output=True, text=True, check=True)
    assert re.match(r"-1 1 (done|CUDA driver|no CUDA)", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in targets.names() if targets.load(name).gpu])
@pytest.mark.parametrize("emit", ["vm", "c-lib"])
def test_every_gpu_gets_both_libraries(name: str, emit: artifact.Emit, small_model: Path, tmp_path: Path) -> None:
    """Of a whole network, with machine code for the GPU that was named."""
    target = targets.load(name)
    compiler = cuda_machine.need_nvcc(target)
    library = "net" if emit == "c-lib" else None
    made = compile_network(small_model, tmp_path / "made", target, 1, emit=emit, name=library)
    assert target.gpu is not None and target.gpu.arch in made.gpus
    assert {arch for arch, _ in compiler.machine_code(tmp_path / "made" / made.library)} == set(made.gpus)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--emit", "c-source"], "is a GPU, and C source is for CPUs: compile with --emit c-lib"),
        (["--threads", "2"], "is a GPU, which has no use for 2 threads"),
    ],
)
def test_what_makes_no_sense_for_a_gpu(
    options: list[str],
    sentence: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["crossbit", "compile", str(model), "-o", str(tmp_path / "a"), "-t", "cuda-sm80", *options]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, r"lacks an NVIDIA GPU of compute capability 8\.0 to 8\.9 or 9\.0 to 9\.9 \(no NVIDIA driver answers\)"),
        ((7, 5), r"lacks an NVIDIA GPU of .* \(its GPU has 7\.5\)"),
        ((10, 0), r"lacks an NVIDIA GPU of .* \(its GPU has 10\.0\)"),
    ],
)
def test_a_machine_without_the_gpu_is_refused(
    found: tuple[int, int] | None, sentence: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets._gpu, "capability", lambda: found)
    monkeypatch.setattr(targets, "capability", lambda: found)
    assert artifact.read(library).gpus == ("sm_80", "sm_86", "sm_89", "sm_90")
    with pytest.raises(ValueError, match=f"compiled for cuda-sm80, and this machine {sentence}; run it there"):
        session.open_session(library)


def test_python_times_no_c_library_of_a_gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "missing_gpu", lambda gpus: "")
    opened = session.open_session(library)
    inputs = {"x": np.zeros((1, 4, 8, 8), np.float32)}
    with pytest.raises(ValueError, match="every run of a GPU's library copies the weights"):
        opened.seconds(inputs, 1)


# A driver that knows no GPU -------------------------------------------------------------------------------------------

DRIVER = "cuDeviceGetName cuFuncSetAttribute cuGetErrorName cuGetErrorString cuLaunchKernelEx cuModuleGetFunction "
DRIVER += "cuModuleLoadData cuModuleUnload cuTensorMapEncodeTiled cuInit"


@pytest.fixture
def driver(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds a driver all of whose functions fail."""
    cuda_machine.need_nvcc(targets.load("cuda-sm80"))
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 34; }}\n" for name in DRIVER.split()))
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", soname, "-o", tmp_path / "libcuda.so.1", source], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}


def test_tvm_finds_the_runtime_of_the_wheel_and_no_gpu(driver: dict[str, str]) -> None:
    code = "from pipeline import gpu; gpu.device()"
    done = subprocess.run([sys.executable, "-c", code], env=driver, capture_output=True, text=True, check=False)
    assert "ValueError: TVM's CUDA runtime finds no GPU" in done.stderr


def test_building_compiles_nothing_where_there_is_a_driver(driver: dict[str, str], model: Path) -> None:
    """TVM would, with NVRTC, once its CUDA back end is loaded."""
    code = f"""
import targets, tvm, tvm_ffi
from pathlib import Path
from pipeline import compiler, gpu, importer
try:
    gpu.device()
except ValueError:
    pass
assert tvm.get_global_func("ffi.Module.create.cuda")
def refuse(source):
    raise AssertionError("compiled")
tvm_ffi.register_global_func("tvm_callback_cuda_compile", refuse, override=True)
target = targets.load("cuda-sm80")
built = compiler.build_cuda(compiler.lower(importer.load(Path("{model}"), 1, target)), target)
assert "__global__" in built.source
try:
    tvm.get_global_func("tvm_callback_cuda_compile")("")
except AssertionError:
    print("its own again")
"""
    done = subprocess.run([sys.executable, "-c", code], env=driver, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "its own again", done.stderr[-2000:]
