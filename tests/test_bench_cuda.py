"""scripts/bench_cuda.py without a GPU: what it refuses, and a whole run on an emulated one, with an emulated driver."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_machine
import numpy as np
import pytest

import targets

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_cuda.py"
SUBJECTS = ("conv 7x7x512 to bits, batch 1", "digits")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cuda", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_cuda"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a Python that has nothing but NumPy."""
    absent = ("tvm", "torch", "pydantic", "typer", "rich", "onnx")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv[0] = {str(SCRIPT)!r}; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_is_refused_in_a_sentence(tmp_path: Path) -> None:
    if targets.capability() is not None:
        pytest.skip("this machine has a GPU")
    for arguments in ([], ["--run", str(tmp_path)]):
        done = call(*arguments)
        assert done.returncode == 2
        assert re.fullmatch(r"error: no NVIDIA GPU answers here \(.*\): run `.*--build DIR` here.*\n", done.stderr)


def test_a_cpu_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target x86-avx2 is no GPU"):
        script.build(tmp_path, "x86-avx2", "")


def test_the_peak_is_tensor_core_code_and_counts_its_operations(script: ModuleType, tmp_path: Path) -> None:
    """Unrolled, a round has one instruction for each of its chains, and each is 16 x 8 x 256 products a warp."""
    nvcc = cuda_machine.need_nvcc(targets.load("cuda-sm90"))
    nvcc.compile(script.PEAK, tmp_path / "peak.o", ["sm_90"])
    ((_, code),) = nvcc.machine_code(tmp_path / "peak.o").items()
    assert len(re.findall(r"\bBMMA\.168256\.AND\.POPC\b", code)) % 8 == 0 < code.count("BMMA")
    assert not re.search(r"\s(LDL|STL|CALL)\b", code)
    chains, warps = 8, 256 // 32
    assert 2 * 16 * 8 * 256 * chains * warps == script.PEAK_OPERATIONS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++ (apt-get install g++)")
def test_a_run_on_an_emulated_gpu(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_machine.emulate(monkeypatch)
    folder = tmp_path / "built"
    subjects = []
    for subject in SUBJECTS:
        script.build(folder, "cuda-sm80", subject)
        facts = json.loads((folder / "bench.json").read_text())
        subjects += [each for each in facts["subjects"] if each["batch"] == 1]
    facts["subjects"] = subjects
    (folder / "bench.json").write_text(json.dumps(facts))
    where = cuda_machine.driver(tmp_path)

    result = tmp_path / "result.json"
    done = call("--run", str(folder), "--rounds", "3", "--json", str(result), **where)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert (found["gpu"], found["target"]) == ("emulated", "cuda-sm80")
    assert found["absent"] == ["torch is absent (import of torch halted; None in sys.modules), so it is not beside"]
    ways = {(row["subject"], row["way"]) for row in found["rows"]}
    names = [s["name"] for s in facts["subjects"]]
    assert ways == {(name, way) for name in names for way in ("crossbit", "crossbit, graph")}
    assert all(row["p10_us"] <= row["us"] <= row["p90_us"] for row in found["rows"])
    conv = next(row for row in found["rows"] if row["subject"] == names[0] and row["way"] == "crossbit")
    assert conv["tops"] == pytest.approx(2 * 7 * 7 * 512 * 512 * 9 / conv["us"] / 1e6)

    stem = folder / f"{facts['subjects'][0]['stem']}.npz"
    arrays = dict(np.load(stem))
    arrays["expected"].flat[-1] ^= 1
    np.savez(stem, **arrays)
    done = call("--run", str(folder), "--rounds", "3", **where)
    assert done.returncode == 2
    assert "differs by 1, allowed 0; so nothing is timed" in done.stderr

    facts["subjects"][0]["gpus"] = ["sm_75", "sm_89", "sm_90"]
    (folder / "bench.json").write_text(json.dumps(facts))
    done = call("--run", str(folder), **where)
    assert "built for sm_75, sm_89, sm_90, and this GPU has 8.6" in done.stderr
