"""What a C library does with a wrong call, and what sanitizers say about right ones."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import c_apps
import numpy as np
import onnx
import pytest
from c_apps import EMITS
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import targets
from pipeline import artifact
from tvm_ops import schedule_cpu

OK, NULL, MISALIGNED, OVERLAP, WORKSPACE, INTERFACE, CPU, POOL = range(0, -8, -1)
CODES = {
    OK: "done",
    NULL: "a pointer is NULL",
    MISALIGNED: "not aligned to 4 bytes",
    OVERLAP: "overlaps another tensor",
    WORKSPACE: "the workspace is smaller than",
    INTERFACE: "the header of another library",
    CPU: "this CPU lacks instructions",
    POOL: "the pool has no parallel_for",
}
PARALLEL_FOR = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    ctypes.c_void_p,
    ctypes.c_int32,
)
THREADS = 2


class Pool(ctypes.Structure):
    _fields_ = [("self", ctypes.c_void_p), ("workers", ctypes.c_int32), ("parallel_for", PARALLEL_FOR)]


@PARALLEL_FOR
def serial(_self: int, work: Any, context: int, count: int) -> None:
    """From the end, a step at a time, by the last worker."""
    for i in reversed(range(count)):
        work(context, i, i + 1, THREADS - 1)


NO_FUNCTION = ctypes.cast(None, PARALLEL_FOR)  # type: ignore[type-var]


class Library:
    """A network of two inputs and two outputs through ctypes, its tensors in one block of memory.

    The block is larger than everything together, so that any address of a fault is still ours.
    """

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "libnet.so"))
        self.library.net_strerror.restype = ctypes.c_char_p
        manifest = artifact.read(folder)
        assert manifest.c_library is not None
        self.sizes = [4 * int(np.prod(spec.shape)) for spec in (*manifest.inputs, *manifest.outputs)]
        self.sizes.append(manifest.c_library.workspace_bytes)
        self.interface = int((folder / "net.h").read_text().split("NET_INTERFACE 0x")[1][:8], 16)
        self.inputs = len(manifest.inputs)
        room = sum(size + 4096 for size in self.sizes)
        self.memory = np.zeros(room + 64, np.uint8)
        self.places, at = [], self.memory.ctypes.data + -self.memory.ctypes.data % 64
        for size in self.sizes:
            self.places.append(at + 1024)
            at += -(-(size + 2048) // 64) * 64

    def run(
        self,
        places: list[int | None] | None = None,
        interface: int | None = None,
        size: int | None = None,
        pool: Pool | None = None,
    ) -> int:
        given_places = self.places if places is None else places
        return int(
            self.library.net_run_with(
                ctypes.c_uint32(self.interface if interface is None else interface),
                *(ctypes.c_void_p(place) for place in given_places),
                ctypes.c_size_t(self.sizes[-1] if size is None else size),
                ctypes.byref(pool) if pool is not None else None,
            )
        )

    def at(self, i: int) -> np.ndarray:
        start = self.places[i] - self.memory.ctypes.data
        return self.memory[start : start + self.sizes[i]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs, two outputs, and kernels between them that need a workspace."""
    node = helper.make_node
    nodes = [
        node("Add", ["x", "z"], ["sum"]),
        node("MaxPool", ["sum"], ["pooled"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("MaxPool", ["pooled"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Softmax", ["flat"], ["p"]),
    ]

    def specs(**shapes: list[int]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    shape = [1, 4, 6, 5]
    made = helper.make_graph(nodes, "g", specs(x=shape, z=shape), specs(y=shape, p=[1, 120]))
    path = tmp_path_factory.mktemp("safety") / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    """The network for two workers, whose kernels are all parallel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 1)
        return {emit: c_apps.compiled(model, model.parent, emit, threads=THREADS) for emit in EMITS}


@pytest.fixture(scope="module", params=EMITS)
def library(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Library:
    folder = folders[request.param]
    if request.param == "c-source":
        command = ["gcc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{folder}", str(folder / "net.c")]
        shared = folder.parent / "built"
        shutil.copytree(folder, shared)
        subprocess.run([*command, "-o", str(shared / "libnet.so"), "-lm"], check=True)
        return Library(shared)
    return Library(folder)


def test_statuses_have_sentences(library: Library) -> None:
    for code, words in CODES.items():
        assert words in library.library.net_strerror(code).decode()
    for code in (1, -8, 2**31 - 1, -(2**31)):
        assert library.library.net_strerror(code) == b"no status of net"


def test_a_null_for_every_pointer(library: Library) -> None:
    assert library.run() == OK
    for i in range(len(library.places)):
        assert library.run([None if i == j else place for j, place in enumerate(library.places)]) == NULL


def test_everything_must_be_aligned(library: Library) -> None:
    for i in range(len(library.places)):
        workspace = i == len(library.places) - 1
        for by in (1, 2, 3, *((4, 8, 16, 32) if workspace else ())):
            assert library.run([p + by * (i == j) for j, p in enumerate(library.places)]) == MISALIGNED
        for by in (64, *(() if workspace else (4, 8, 60))):
            assert library.run([p + by * (i == j) for j, p in enumerate(library.places)]) == OK


def test_every_pair_that_overlaps(library: Library) -> None:
    """By all of it, by the first and by the last float of either; side by side is fine."""
    count = len(library.places)
    for i in range(count):
        for j in range(count):
            if i == j or i == count - 1:
                continue
            places: list[int | None] = list(library.places)
            inputs = max(i, j) < library.inputs
            begin, end = library.places[j], library.places[j] + library.sizes[j]
            for at in (begin, end - 4, begin + 4 - library.sizes[i]):
                places[i] = at
                assert library.run(places) == (OK if inputs else OVERLAP), (i, j)
            for at in (end, begin - library.sizes[i]):
                places[i] = at
                assert library.run(places) == OK, (i, j)


def test_workspace_interface_and_pools(library: Library) -> None:
    size = library.sizes[-1]
    assert [library.run(size=s) for s in (0, size - 1, size, size + 1, 2**64 - 1)] == [WORKSPACE] * 2 + [OK] * 3
    assert library.run(interface=library.interface ^ 1) == INTERFACE == library.run(interface=0)
    for workers, function, status in (
        (2, serial, OK),
        (0, serial, POOL),
        (-1, serial, POOL),
        (3, serial, POOL),
        (2, NO_FUNCTION, POOL),
    ):
        assert library.run(pool=Pool(None, workers, function)) == status


@given(data=st.data())
def test_no_combination_of_faults_crashes(library: Library, data: st.DataObject) -> None:
    """Outputs stay as they are unless the status is 0; then they are right."""
    draw = data.draw
    count = len(library.places)
    places: list[int | None] = list(library.places)
    expected = set()
    for i in draw(st.lists(st.integers(0, count - 1), max_size=2, unique=True)):
        fault = draw(st.sampled_from(["null", "misaligned", "onto another"]))
        if fault == "null":
            places[i] = None
            expected.add(NULL)
        elif fault == "misaligned":
            places[i] = library.places[i] + draw(st.integers(1, 3))
            expected.add(MISALIGNED)
        else:
            places[i] = library.places[draw(st.integers(0, count - 1))]
    interface = draw(st.sampled_from([library.interface, library.interface, 0, 0xFFFFFFFF]))
    size = draw(st.sampled_from([library.sizes[-1], library.sizes[-1] - 1, 0, 2**40]))
    workers = draw(st.sampled_from([None, 2, 2, 0, 3, -(2**31), 2**31 - 1]))
    pool = None if workers is None else Pool(None, workers, draw(st.sampled_from([serial, NO_FUNCTION])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    library.memory[:] = 0
    for i in range(library.inputs):
        library.at(i).view(np.float32)[:] = rng.integers(-9, 9, library.sizes[i] // 4)
    before = library.memory.copy()
    status = library.run(places, interface, size, pool)
    assert status in CODES
    if status:
        np.testing.assert_array_equal(library.memory, before)
    else:
        assert not expected and interface == library.interface and size >= library.sizes[-1]
    if expected:
        assert status in {*expected, INTERFACE}


def test_an_app_with_another_networks_header(folders: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    """The same name and the same functions, other sizes."""
    other = c_apps.compiled(small_model, tmp_path, "c-lib")
    (tmp_path / "app.c").write_text(
        '#include "net.h"\n#include <stdlib.h>\nint main(void) {\n'
        "  static float x[NET_X_ELEMENTS], y[NET_Y_ELEMENTS];\n"
        "  void *memory = aligned_alloc(64, NET_WORKSPACE_BYTES);\n  return -net_run(x, y, memory);\n}\n"
    )
    for library, status in ((folders["c-lib"], -INTERFACE), (other, OK)):
        command = ["gcc", f"-I{other}", str(tmp_path / "app.c"), str(library / "libnet.a"), "-lm"]
        subprocess.run([*command, "-o", str(tmp_path / "app")], check=True)
        assert subprocess.run([str(tmp_path / "app")], check=False).returncode == status


def test_a_cpu_without_the_instructions(model: Path, tmp_path: Path) -> None:
    target = targets.load("x86-avx512")
    if not target.missing_features():
        pytest.skip("this CPU has all that x86-avx512 asks for")
    if targets.host().machine != target.machine:
        pytest.skip("the library cannot be loaded on this machine")
    library = Library(c_apps.compiled(model, tmp_path, "c-lib", "x86-avx512"))
    before = library.memory.copy()
    assert library.run() == CPU
    np.testing.assert_array_equal(library.memory, before)
    assert b"this CPU lacks instructions that x86-avx512 has" in library.library.net_strerror(CPU)


@pytest.mark.parametrize("cpu", ["Nehalem", "qemu64"])
@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512bw", "x86-avx512vnni", "x86-avx512"])
def test_an_old_cpu(name: str, cpu: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver itself has no instruction that such a CPU lacks: it lives to say so."""
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is missing: `scripts/setup` as root installs it (qemu-user)")
    monkeypatch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 1)  # the driver of shared work is the longest
    folder = c_apps.compiled(model, tmp_path, "c-lib", name, threads=THREADS)
    app = c_apps.build(folder, cc=("gcc",))
    (tmp_path / "in").write_bytes(bytes(4 * 240))
    command = [
        "qemu-x86_64",
        "-cpu",
        cpu,
        str(app.program),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "0",
        "0",
        "1",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "lacks instructions that " + name in done.stderr) == (-CPU, True), done


# Sanitizers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def threaded(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` in C99, every kernel parallel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 1)
        return c_apps.compiled(small_model, tmp_path_factory.mktemp("threaded"), "c-source", threads=2)


def sanitized(folder: Path, name: str, flags: tuple[str, ...]) -> c_apps.App:
    probe = subprocess.run(
        ["gcc", *flags, "-xc", "-", "-o", str(folder.parent / "probe")], input=b"int main(void){return 0;}", check=False
    )
    if probe.returncode:
        pytest.skip(f"gcc has no {flags[0]} here")
    return c_apps.build(folder, both=("-O1", "-g", *flags), cc=("gcc",), link=(), name=name)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_addresses_and_undefined_behaviour(workers: int, threaded: Path, rng: np.random.Generator) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    app = sanitized(threaded, f"asan{workers}", flags)
    inputs = [{"x": rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32)} for _ in range(2)]
    app.run(inputs, workers=workers, shift=1)


def test_races(threaded: Path, rng: np.random.Generator) -> None:
    """Three callers of a pool of two."""
    app = sanitized(threaded, "tsan", ("-fsanitize=thread",))
    inputs = [{"x": rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32)} for _ in range(3)]
    app.run(inputs, workers=2, repeats=5)
    assert app.pool_calls[0] > 0


def test_valgrind(small_model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """No byte that was not written decides anything, in LLVM's code either (valgrind knows no AVX-512)."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is missing: apt-get install valgrind")
    if targets.load("x86-avx2").missing_features():
        pytest.skip("no machine for target x86-avx2 here")
    folder = c_apps.compiled(small_model, tmp_path, "c-lib", "x86-avx2")
    app = c_apps.build(folder, both=("-g", "-DUNDEFINED_WORKSPACE"), cc=("gcc",), link=())
    (tmp_path / "in").write_bytes(rng.normal(0, 1, 64).astype(np.float32).tobytes())
    options = ["--error-exitcode=77", "--leak-check=full", "--quiet"]
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "1", "0", "1", "2"]
    done = subprocess.run(
        ["valgrind", *options, str(app.program), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
