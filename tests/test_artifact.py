"""An artifact is whole, unchanged and for this machine, or it is refused with a sentence that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

import targets
from pipeline import artifact, inspection, session
from pipeline.packaging import compile_network, golden_pair, oracle
from pipeline.session import Session


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def change(folder: Path, **fields: Any) -> None:
    """Write other fields to the manifest."""
    (folder / "manifest.json").write_text(json.dumps(manifest(folder) | fields))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest say what a changed file is now."""
    content = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change(folder, files=manifest(folder)["files"] | {name: entry})


def patch(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# What is written ---------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_compiled(small_artifact: Path, small_model: Path) -> None:
    found = artifact.read(small_artifact)
    host = targets.host()
    assert (found.schema_version, found.name, found.emit) == (4, "artifact", "vm")
    assert (found.target, found.machine, found.threads) == (host.name, host.machine, 1)
    assert set(found.features) == host.features
    assert found.model_sha256 == hashlib.sha256(small_model.read_bytes()).hexdigest()
    assert [(t.name, t.shape, t.dtype, t.layout) for t in found.inputs] == [("x", (1, 1, 8, 8), "float32", "NCHW")]
    assert [(t.name, t.shape, t.dtype, t.layout) for t in found.outputs] == [("y", (1, 10), "float32", "NC")]
    assert found.layers == inspection.inspect(small_model).layers
    assert found.kernels >= len(found.layers)
    assert found.tuned_kernels == 0
    assert set(found.files) == {"model.so", "golden.npz"}
    for name, file in found.files.items():
        content = (small_artifact / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert {f.name for f in small_artifact.iterdir()} == {"model.so", "golden.npz", "manifest.json"}
    assert set(found.versions) == {"crossbit", "apache-tvm", "apache-tvm-ffi", "onnx"}
    assert found.created.endswith("+00:00")
    assert small_artifact.stat().st_mode & 0o777 == 0o755


def test_a_file_with_a_batch_of_its_own_is_compiled_for_that(small_model: Path, tmp_path: Path) -> None:
    proto = onnx.load(small_model)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    fixed = tmp_path / "fixed.onnx"
    onnx.save(proto, fixed)
    made = compile_network(fixed, tmp_path / "made", targets.host(), 1, batch=3)
    assert made.inputs[0].shape == (3, 1, 8, 8)
    open_batch = compile_network(small_model, tmp_path / "open", targets.host(), 1, batch=3)
    assert made.layers == open_batch.layers


def test_nothing_is_left_beside_an_artifact(small_artifact: Path) -> None:
    assert not [f.name for f in small_artifact.parent.iterdir() if f.name.startswith(".")]


def test_the_golden_pair_is_onnx_runtimes(small_artifact: Path, small_model: Path) -> None:
    inputs, outputs = artifact.golden(small_artifact)
    (expected,) = oracle(small_model).run(None, inputs)
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], expected)
    assert expected.std() > 0


def test_golden_inputs_are_repeatable_and_of_the_batch(small_model: Path) -> None:
    first, second = golden_pair(small_model, 3), golden_pair(small_model, 3)
    assert first[0]["x"].shape == (3, 1, 8, 8)
    assert first[1]["y"].shape == (3, 10)
    for one, other in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_golden_names_may_hold_colons(rng: np.random.Generator, tmp_path: Path) -> None:
    inputs = {"in:a": rng.random((1, 2)), "out:b": rng.random((3,))}
    outputs = {"x": rng.random((2, 2)), "in:y": rng.random((1,))}
    artifact.save_golden(tmp_path / "golden.npz", inputs, outputs)
    for found, expected in zip(artifact.golden(tmp_path), (inputs, outputs), strict=True):
        assert list(found) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


# What is refused ---------------------------------------------------------------------------------------------------


def flipped(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def shortened(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def without(folder: Path, name: str) -> None:
    files = {k: v for k, v in manifest(folder)["files"].items() if k != name}
    change(folder, files=files)


def as_machine(folder: Path, code: int) -> None:
    patch(folder / "model.so", 18, struct.pack("<H", code))
    rehash(folder, "model.so")


def as_text(folder: Path) -> None:
    (folder / "model.so").write_text("no library at all, only text")
    rehash(folder, "model.so")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "library byte": (lambda f: flipped(f, "model.so"), r"model\.so: changed since it was compiled \(SHA-256 differs\)"),
    "golden byte": (lambda f: flipped(f, "golden.npz"), r"golden\.npz: changed since it was compiled"),
    "short library": (
        lambda f: shortened(f, "model.so"),
        r"model\.so: \d+ bytes, the manifest says \d+; compile again",
    ),
    "empty library": (lambda f: os.truncate(f / "model.so", 0), r"model\.so: 0 bytes, the manifest says \d+"),
    "no library": (lambda f: (f / "model.so").unlink(), r"model\.so: missing; compile again"),
    "no golden pair": (lambda f: (f / "golden.npz").unlink(), r"golden\.npz: missing; compile again"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"not an artifact \(it has no manifest\.json\); `crossb"),
    "unlisted library": (lambda f: without(f, "model.so"), r"manifest\.json: lists no model\.so; compile again"),
    "unlisted golden pair": (lambda f: without(f, "golden.npz"), r"manifest\.json: lists no golden\.npz"),
    "newer schema": (
        lambda f: change(f, schema_version=5),
        r"manifest\.json: schema_version: .*; compile again with th",
    ),
    "wrong type": (lambda f: change(f, threads="many"), r"manifest\.json: threads: .*; compile again with this crossb"),
    "unknown field": (lambda f: change(f, colour="red"), r"manifest\.json: colour: .*; compile again"),
    "wrong layout": (lambda f: change(f, inputs=[{"name": "x"}]), r"manifest\.json: inputs\.0\.shape: .*compile again"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: the file: .*; compile again"),
    "ARM library": (
        lambda f: as_machine(f, 183),
        r"model\.so: built for aarch64, the manifest says x86_64; compile ag",
    ),
    "library of an unknown machine": (lambda f: as_machine(f, 999), r"model\.so: built for ELF machine 999, the manif"),
    "text as library": (as_text, r"model\.so: built for no ELF machine, the manifest says x86_64"),
    "other machine": (
        lambda f: change(f, machine="aarch64"),
        r"model\.so: built for x86_64, the manifest says aarch64",
    ),
}


@pytest.mark.skipif(targets.host().machine != "x86_64", reason="the machine's name is in the sentences")
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_artifact_is_refused(spoilt: str, copied: Path) -> None:
    spoil, sentence = SPOILT[spoilt]
    artifact.read(copied)
    spoil(copied)
    for reader in (artifact.read, Session, session.verify):
        with pytest.raises(ValueError, match=sentence) as refusal:
            reader(copied)
        assert str(copied) in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file"])
def test_what_is_no_artifact_is_refused(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if what == "an empty folder":
        folder.mkdir()
    elif what == "a file":
        folder.write_text("text")
    with pytest.raises(ValueError, match=r"folder: not an artifact \(it has no manifest\.json\)"):
        artifact.read(folder)


# Writing over what is there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a file"])
def test_what_is_no_artifact_is_not_overwritten(
    what: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    if what == "a file":
        folder.write_text("precious")
    else:
        folder.mkdir()
        if what == "a folder":
            (folder / "precious.txt").write_text("precious")
    without_code(monkeypatch)
    with pytest.raises(ValueError, match="mine: exists and is no artifact; give another folder, or remove it"):
        compile_network(small_model, folder, targets.host(), 1)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    if what == "a file":
        assert folder.read_text() == "precious"
    else:
        assert [f.read_text() for f in folder.iterdir()] == ["precious"] * (what == "a folder")


def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile to an empty library: for tests that are about files."""

    class Executable:
        def export_library(self, path: str, **_: object) -> None:
            Path(path).write_bytes(b"\x7fELF" + bytes(14) + struct.pack("<H", 62) + bytes(100))

    monkeypatch.setattr("pipeline.compiler.lower", lambda mod: mod)
    monkeypatch.setattr("pipeline.compiler.build", lambda *_: (Executable(), 1, 0))


def test_an_artifact_is_replaced_whole(copied: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "stale.txt").write_text("of the old one")
    without_code(monkeypatch)
    written = compile_network(small_model, copied, targets.load("x86-avx2"), 2, batch=2)
    assert artifact.read(copied) == written
    assert (written.target, written.threads, written.inputs[0].shape[0]) == ("x86-avx2", 2, 2)
    assert not (copied / "stale.txt").exists()
    assert [f.name for f in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize(
    "broken",
    [
        "pipeline.compiler.build",
        "pipeline.artifact.save_golden",
        "pipeline.artifact.sha256",
        "pipeline.inspection.inspect",
        "pipeline.artifact.write",
        "second rename",
    ],
)
def test_a_failed_compilation_leaves_the_old_artifact(
    broken: str, copied: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.name: f.read_bytes() for f in copied.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    without_code(monkeypatch)
    if broken == "second rename":
        rename = os.rename

        def once(source: Path, target: Path) -> None:
            if target == copied and source.name != "artifact":
                fail()
            rename(source, target)

        monkeypatch.setattr("os.rename", once)
    else:
        monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="the disk is full"):
        compile_network(small_model, copied, targets.host(), 1)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in copied.iterdir()} == before
    assert [f.name for f in copied.parent.iterdir()] == [copied.name]


def test_folders_on_the_way_are_made(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_code(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert compile_network(small_model, Path("a/b/c"), targets.host(), 1).name == "c"
    assert artifact.read(tmp_path / "a" / "b" / "c").name == "c"


# Sessions ----------------------------------------------------------------------------------------------------------


def test_a_session_gives_the_golden_output(small_artifact: Path) -> None:
    loaded = Session(small_artifact)
    inputs, expected = artifact.golden(small_artifact)
    outputs = loaded.run(inputs)
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], expected["y"], rtol=0, atol=1e-5 * np.abs(expected["y"]).max())


def test_calls_do_not_touch_each_other(small_artifact: Path, rng: np.random.Generator) -> None:
    loaded = Session(small_artifact)
    x, other = (rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32) for _ in range(2))
    first = loaded.run({"x": x})["y"]
    kept, given = first.copy(), x.copy()
    assert not np.array_equal(loaded.run({"x": other})["y"], first)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(x, given)
    np.testing.assert_array_equal(loaded.run({"x": x})["y"], kept)
    np.testing.assert_array_equal(Session(small_artifact).run({"x": x})["y"], kept)


def test_inputs_need_not_be_contiguous(small_artifact: Path, rng: np.random.Generator) -> None:
    loaded = Session(small_artifact)
    wide = rng.normal(0, 1, (1, 1, 8, 16)).astype(np.float32)
    x = np.ascontiguousarray(wide[..., ::2])
    for same in (wide[..., ::2], np.asfortranarray(x), x[:, :, ::-1].copy()[:, :, ::-1]):
        np.testing.assert_array_equal(loaded.run({"x": same})["y"], loaded.run({"x": x})["y"])


@pytest.mark.parametrize("offset", [4, 8, 20, 60])
def test_inputs_need_not_be_aligned(offset: int, small_artifact: Path, rng: np.random.Generator) -> None:
    """Compiled code crashes on what does not start at a multiple of 64 bytes; a session hands it copies that do."""
    loaded = Session(small_artifact)
    memory = np.empty(2 * 64 + 4 * 64, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    x = memory[start : start + 4 * 64].view(np.float32).reshape(1, 1, 8, 8)
    assert x.ctypes.data % 64 == offset
    x[:] = rng.normal(0, 1, x.shape)
    np.testing.assert_array_equal(loaded.run({"x": x})["y"], loaded.run({"x": x.copy()})["y"])


def test_a_session_is_for_one_thread_at_a_time(small_artifact: Path, rng: np.random.Generator) -> None:
    """Without the lock, TVM's machine crashes here or mixes the calls up."""
    loaded = Session(small_artifact)
    inputs = {"x": rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32)}
    expected = loaded.run(inputs)["y"]
    refused, wrong = [], []

    def call() -> None:
        for _ in range(300):
            try:
                wrong.append(not np.array_equal(loaded.run(inputs)["y"], expected))
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    timing = threading.Thread(target=loaded.seconds, args=(inputs, 50_000))
    for thread in threads:
        thread.join()
    assert not any(wrong)
    timing.start()
    while not loaded._lock.locked():
        pass
    for method, arguments in ((loaded.run, []), (loaded.seconds, [1]), (loaded.kernel_seconds, [1])):
        with pytest.raises(RuntimeError, match="artifact: this session is running in another thread; open one session"):
            method(inputs, *arguments)  # type: ignore[operator]
    timing.join()
    assert set(refused) <= {f"{small_artifact}: this session is running in another thread; open one session a thread"}
    np.testing.assert_array_equal(loaded.run(inputs)["y"], expected)


def test_a_refused_call_leaves_the_session_free(small_artifact: Path) -> None:
    loaded = Session(small_artifact)
    with pytest.raises(ValueError, match="the inputs are"):
        loaded.run({})
    assert session.verify(loaded).passed


def test_sessions_of_one_artifact_run_at_the_same_time(
    small_artifact: Path, small_model: Path, rng: np.random.Generator
) -> None:
    """Four threads, each with its own session and pictures, meet in every round."""
    x = rng.normal(0, 1, (4, 50, 1, 1, 8, 8)).astype(np.float32)
    alone = Session(small_artifact)
    expected = [[alone.run({"x": image})["y"] for image in images] for images in x]
    together = threading.Barrier(4)
    found: dict[int, list[np.ndarray]] = {}

    def call(index: int) -> None:
        mine = Session(small_artifact)
        outputs = []
        for image in x[index]:
            together.wait(60)
            outputs.append(mine.run({"x": image})["y"])
        found[index] = outputs

    threads = [threading.Thread(target=call, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(found[i], expected[i])


@pytest.mark.skipif(targets.cores() < 2, reason="TVM's pool has one thread here")
def test_every_call_has_the_threads_it_was_compiled_for(small_model: Path, tmp_path: Path) -> None:
    """Whatever size the pool of the calling thread has had before."""
    compile_network(small_model, tmp_path / "two", targets.host(), threads=2)
    inputs, _ = artifact.golden(tmp_path / "two")
    loaded = Session(tmp_path / "two")
    configure, size = (tvm.get_global_func(f"runtime.{name}") for name in ("config_threadpool", "NumThreads"))
    found = []

    def call() -> None:
        configure(session.ALL_CORES, 1)
        loaded.run(inputs)
        found.append(size())

    call()
    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert found == [2, 2]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, r"the inputs are \['x'\], given \[\]"),
        ({"z": np.zeros((1, 1, 8, 8), np.float32)}, r"the inputs are \['x'\], given \['z'\]"),
        ({"x": np.zeros((1, 1, 8, 8)), "z": np.zeros(1)}, r"the inputs are \['x'\], given \['x', 'z'\]"),
        (
            {"x": np.zeros((2, 1, 8, 8), np.float32)},
            r"input 'x' is float32 \[1, 1, 8, 8\], given float32 \[2, 1, 8, 8\]",
        ),
        ({"x": np.zeros((1, 8, 8), np.float32)}, r"input 'x' is float32 \[1, 1, 8, 8\], given float32 \[1, 8, 8\]"),
        ({"x": np.zeros((1, 1, 8, 8))}, r"input 'x' is float32 \[1, 1, 8, 8\], given float64 \[1, 1, 8, 8\]"),
        ({"x": np.zeros((1, 1, 8, 8), np.uint8)}, "input 'x' is float32 .*, given uint8"),
    ],
)
@pytest.mark.parametrize("call", ["run", "seconds", "kernel_seconds"])
def test_wrong_inputs_are_refused(
    call: str, inputs: dict[str, np.ndarray], sentence: str, small_artifact: Path
) -> None:
    arguments = [inputs] if call == "run" else [inputs, 1]
    with pytest.raises(ValueError, match=sentence):
        getattr(Session(small_artifact), call)(*arguments)


def test_a_cpu_without_the_features_is_refused(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = targets.host()
    lost = sorted(host.features)[:2]
    monkeypatch.setattr(session, "cpu_features", lambda: host.features - set(lost))
    sentence = f"artifact: compiled for {host.name}, and this CPU lacks {', '.join(lost)}; compile with --target host"
    with pytest.raises(ValueError, match=sentence):
        Session(small_artifact)
    monkeypatch.setattr(session, "cpu_features", lambda: host.features | {"more"})
    assert Session(small_artifact).manifest.target == host.name


def test_another_machine_is_refused(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ValueError, match=r"compiled for \w+, this is riscv64; compile with a --target of this machine"):
        Session(small_artifact)


def test_times(small_artifact: Path) -> None:
    loaded = Session(small_artifact)
    inputs, _ = artifact.golden(small_artifact)
    before = loaded.run(inputs)["y"]
    assert 0 < loaded.seconds(inputs, 5) < 1
    kernels = loaded.kernel_seconds(inputs, 3)
    assert list(kernels) == sorted(kernels)
    assert len(kernels) >= len(loaded.manifest.layers) + 1  # and the packing of floats
    assert all(0 < seconds < 1 for seconds in kernels.values())
    assert sum("bitserial_conv2d" in name for name in kernels) == 2
    np.testing.assert_array_equal(loaded.run(inputs)["y"], before)


# The golden pair ---------------------------------------------------------------------------------------------------


def test_verify_passes(small_artifact: Path) -> None:
    verdict = session.verify(small_artifact)
    assert verdict.passed
    assert verdict.target == targets.host().name
    assert 0 <= verdict.error <= verdict.limit < 1


def test_verify_takes_an_open_session(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads no file but the golden pair."""
    loaded = Session(small_artifact)
    expected = session.verify(small_artifact)
    monkeypatch.setattr(artifact, "sha256", None)
    assert session.verify(loaded) == expected


@pytest.mark.parametrize("altered", ["one output a little", "one output much", "NaN", "the input"])
def test_verify_fails_where_the_golden_pair_is_another(altered: str, copied: Path) -> None:
    """With hashes that fit, so that only the outputs can tell."""
    inputs, outputs = artifact.golden(copied)
    limit = session.verify(copied).limit
    if altered == "the input":
        inputs["x"][..., :4, :] *= -1
    else:
        outputs["y"][0, 3] += {"one output a little": 2 * limit, "one output much": 100, "NaN": np.nan}[altered]
    artifact.save_golden(copied / "golden.npz", inputs, outputs)
    rehash(copied, "golden.npz")
    verdict = session.verify(copied)
    assert not verdict.passed
    assert verdict.error > verdict.limit
    if altered == "one output much":
        assert verdict.error == pytest.approx(100, rel=1e-3)


def test_a_larger_batch(small_model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Every example for itself as in the artifact of one, on two threads."""
    compile_network(small_model, tmp_path / "three", targets.host(), threads=2, batch=3)
    assert session.verify(tmp_path / "three").passed
    loaded = Session(tmp_path / "three")
    x = rng.normal(0, 1, (3, 1, 8, 8)).astype(np.float32)
    together = loaded.run({"x": x})["y"]
    turned = loaded.run({"x": np.ascontiguousarray(x[::-1])})["y"]
    assert together.shape == (3, 10)
    np.testing.assert_allclose(turned[::-1], together, rtol=1e-5, atol=1e-6)
