"""Benchmarks: nothing is timed before it is checked, and what is written can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_artifact import rehash

import targets
from pipeline import artifact, toolchain
from pipeline.bench import Bench, Profile, bench, profile


def test_artifacts_and_onnx_runtime_in_turns(small_artifact: Path, small_model: Path) -> None:
    rounds: list[tuple[int, int]] = []
    result = bench([small_artifact], [small_model], 1, rounds=4, on_round=lambda *r: rounds.append(r))
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    compiled, runtime = result.measurements
    assert (compiled.name, compiled.runtime, compiled.target) == (str(small_artifact), "crossbit", targets.host().name)
    assert (runtime.name, runtime.runtime, runtime.target) == (str(small_model), "onnxruntime", "cpu")
    assert compiled.error is not None and compiled.error < 1e-3
    assert runtime.error is None
    for m in result.measurements:
        assert 0 < m.p10_us <= m.median_us <= m.p90_us < 1e6
        assert m.rounds == 4
    assert (result.threads, result.cpu, result.emulated) == (1, targets.cpu_name(), False)
    assert Bench.model_validate_json(result.model_dump_json()) == result


def test_a_profile_sets_work_beside_time_and_ceiling(small_artifact: Path) -> None:
    found = profile(small_artifact, calls=2)
    manifest = artifact.read(small_artifact)
    assert (set(found.ceilings), found.no_ceiling) == ({"binary", "integer", "float"}, "")
    assert found.ceilings["binary"] > found.ceilings["float"] > 0
    assert len(found.kernels) == len(manifest.calls)
    for number, (kernel, call) in enumerate(zip(found.kernels, manifest.calls, strict=True)):
        assert kernel.kernel == f"{number:02d} {call.kernel}"
        assert (kernel.kind, kernel.macs, kernel.bytes) == (call.kind, call.macs, call.bytes)
        if call.macs:
            rate = call.macs / kernel.us / 1e3
            assert kernel.gmacs_per_second == pytest.approx(rate)
            assert kernel.of_ceiling == pytest.approx(rate / found.ceilings[call.kind])
        else:
            assert (kernel.gmacs_per_second, kernel.of_ceiling) == (None, None)
    assert {kernel.kind for kernel in found.kernels} == {"binary", "float", ""}
    assert Profile.model_validate_json(found.model_dump_json()) == found


def test_without_a_compiler_a_profile_has_no_ceiling_and_says_why(
    small_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_installed", lambda _: iter(()))
    found = profile(small_artifact, calls=2)
    assert found.ceilings == {}
    assert found.no_ceiling.startswith(f"no C compiler for target {targets.host().name} on this machine: run `apt-get")
    assert all(kernel.us > 0 and kernel.of_ceiling is None for kernel in found.kernels)
    assert any(kernel.gmacs_per_second for kernel in found.kernels)


def test_two_artifacts_may_be_the_same(small_artifact: Path) -> None:
    result = bench([small_artifact, small_artifact], [], 1, rounds=3)
    assert len(result.measurements) == 2


def test_every_file_is_read_once(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    original = artifact.sha256
    monkeypatch.setattr(artifact, "sha256", lambda path: hashed.append(path) or original(path))
    bench([small_artifact], [], 1, rounds=3)
    assert sorted(file.name for file in hashed) == ["golden.npz", "model.so"]


def test_an_artifact_that_differs_is_not_timed(copied: Path) -> None:
    inputs, outputs = artifact.golden(copied)
    outputs["y"] += 1
    artifact.save_golden(copied / "golden.npz", inputs, outputs)
    rehash(copied, "golden.npz")
    with pytest.raises(ValueError, match=r"copied: differs from ONNX Runtime by [\d.]+, so it is not timed"):
        bench([copied], [], 1, rounds=3)


def test_an_artifact_of_other_threads_is_not_timed(small_artifact: Path) -> None:
    with pytest.raises(ValueError, match="artifact: compiled for 1 threads, asked to time 2"):
        bench([small_artifact], [], 2, rounds=3)


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "there is no such file"), (b"text", "not a valid ONNX model")]
)
def test_what_is_no_onnx_file_is_not_timed(
    content: bytes | None, sentence: str, small_artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.onnx: {sentence}"):
        bench([small_artifact], [path], 1, rounds=3)
