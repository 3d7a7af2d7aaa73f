"""C libraries run from Python: the generated wrapper and the session on it."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest

import targets
from pipeline import session
from pipeline.library_session import LibrarySession
from pipeline.packaging import compile_network, oracle


@pytest.fixture(scope="module")
def library(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "net"
    compile_network(small_model, folder, targets.host(), threads=1, emit="c-lib")
    return folder


def test_it_runs_what_the_file_says(library: Path, small_model: Path, rng: np.random.Generator) -> None:
    opened = session.open_session(library)
    assert isinstance(opened, LibrarySession)
    for _ in range(5):
        x = rng.normal(size=(1, 1, 8, 8)).astype(np.float32)
        strided = np.repeat(x, 2, axis=3)[..., ::2]  # the wrapper makes it contiguous
        np.testing.assert_allclose(
            opened.run({"x": strided})["y"], oracle(small_model).run(None, {"x": x})[0], atol=1e-4
        )


def test_a_prepared_call_keeps_the_memory_that_it_writes(library: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(1, 1, 8, 8)).astype(np.float32)
    call, outputs = LibrarySession(library)._network.prepare({"x": x})
    written = weakref.ref(outputs["y"])
    del outputs
    assert written() is not None
    del call
    assert written() is None


def test_wrong_inputs_are_refused_by_name(library: Path) -> None:
    opened = session.open_session(library)
    for inputs, sentence in (
        ({"z": np.zeros((1, 1, 8, 8), np.float32)}, r"the inputs are \['x'\], given \['z'\]"),
        ({"x": np.zeros((1, 1, 8, 9), np.float32)}, r"'x' is float32 \[1, 1, 8, 8\], given float32 \[1, 1, 8, 9\]"),
        ({"x": np.zeros((1, 1, 8, 8))}, r"'x' is float32 \[1, 1, 8, 8\], given float64"),
    ):
        with pytest.raises(ValueError, match=sentence):
            opened.run(inputs)


def test_threads_are_an_apps(small_model: Path, tmp_path: Path) -> None:
    compile_network(small_model, tmp_path / "net", targets.host(), threads=2, emit="c-lib")
    opened = session.open_session(tmp_path / "net")
    assert session.verify(opened).passed
    with pytest.raises(ValueError, match="compiled for 2 threads, which an app lends and Python cannot"):
        opened.seconds({"x": np.zeros((1, 1, 8, 8), np.float32)}, 1)
