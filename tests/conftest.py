"""Every test that draws numbers takes ``seed``: another one each run, printed, so that a failure can be repeated."""

from __future__ import annotations

import os
import secrets

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
