"""Every test that draws numbers takes ``seed``: another one each run, printed, so that a failure can be repeated."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("crossbit", deadline=None)  # a busy machine is not a failure
settings.load_profile("crossbit")


@pytest.fixture
def seed() -> int:
    """A fresh seed, or the one in CROSSBIT_SEED; torch and NumPy's default generators are set to it."""
    value = int(os.environ.get("CROSSBIT_SEED", secrets.randbits(31)))
    print(f"repeat with CROSSBIT_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator of the run's seed."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of 8x8 images: a float convolution, two binary ones, a float tail. Read it, do not write to it."""
    from torch import nn

    from pipeline import models
    from pipeline.export import export

    path = tmp_path_factory.mktemp("small") / "model.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (16, 64, 40)
        network: nn.Module = models.build("vgg_small", (1, 8, 8), 10, models.Quantize(group=16), widths=widths)
        export(network, (1, 8, 8), path)
    return path


@pytest.fixture(scope="session")
def small_artifact(small_model: Path) -> Iterator[Path]:
    """`small_model` compiled for this CPU. Read it, do not write to it: `copied` gives one to spoil."""
    import targets
    from pipeline.packaging import compile_network

    folder = small_model.parent / "artifact"
    compile_network(small_model, folder, targets.host(), threads=1)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    yield folder
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before, "a test wrote to the shared artifact"


@pytest.fixture
def copied(small_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `small_artifact`."""
    return Path(shutil.copytree(small_artifact, tmp_path / "copied"))
