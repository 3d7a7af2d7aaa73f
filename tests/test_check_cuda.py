"""scripts/check_cuda.py: what it finds wrong, and that it finds nothing wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_machine
import pytest

import targets

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_cuda.py"
KEYS = {"network", "arch", "kernel", "bmma", "calls", "local_accesses", "emulator_equal"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(**changed: Any) -> dict[str, Any]:
    good = {"kernel": "bitserial_gemm_kernel", "arch": "sm_80", "bmma": 4, "calls": 0, "local_accesses": 0}
    return {**good, "network": "digits", "emulator_equal": True, **changed}


def test_what_is_wrong_is_named(script: ModuleType) -> None:
    assert script.wrong(row()) == script.wrong(row(emulator_equal=None)) == []
    for arch in ("sm_75", "sm_80", "sm_87", "sm_90"):
        assert script.wrong(row(arch=arch, bmma=0)) == ["no BMMA"]
    assert script.wrong(row(arch="sm_100", bmma=0)) == script.wrong(row(arch="sm_120", bmma=0)) == []
    assert script.wrong(row(kernel="mean_kernel", bmma=0, calls=1)) == []  # a division
    assert script.wrong(row(calls=1)) == ["calls"]
    assert script.wrong(row(kernel="mean_kernel", bmma=0, local_accesses=2)) == ["local memory"]
    assert script.wrong(row(emulator_equal=False, bmma=0)) == ["no BMMA", "not equal"]


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    cuda_machine.need_nvcc(targets.load("cuda-sm80"))
    file = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(file.read_text())
    assert all(set(each) == KEYS for each in found)
    assert {each["arch"] for each in found} == {"sm_75", "sm_80", "sm_100"}
    bits = [each for each in found if "bitserial" in each["kernel"]]
    assert len(bits) >= 3 * 3
    assert all((each["bmma"] > 0) == (each["arch"] != "sm_100") for each in bits)
    assert all(each["emulator_equal"] for each in found)
