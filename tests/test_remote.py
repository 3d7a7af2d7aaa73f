"""Boards over RPC: TVM's own tracker and servers as processes of this machine, and every way in which they fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_artifact import as_machine, change
from test_cli import Crossbit, crossbit  # noqa: F401

import targets
from pipeline import artifact, remote, session
from pipeline.bench import Bench
from pipeline.packaging import compile_network
from pipeline.remote import Board
from pipeline.session import Session

pytestmark = pytest.mark.slow  # starts three Pythons with TVM in them
pytest.importorskip("tornado", reason="TVM's tracker needs it")
pytest.importorskip("psutil", reason="TVM's servers need it")


def listen() -> tuple[socket.socket, int]:
    server = socket.create_server(("127.0.0.1", 0))
    return server, server.getsockname()[1]


def free_port() -> int:
    server, port = listen()
    server.close()
    return port


@contextlib.contextmanager
def running(module: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A module of TVM as a process group of its own, ended with all its children."""
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", "--silent", *arguments]
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """As a board that is switched off: nobody says goodbye."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keys(address: str) -> list[str] | None:
    """What a tracker has, None where there is no tracker yet."""
    try:
        connection, found = remote._tracker(address)
    except ConnectionError:
        return None
    connection.close()
    return found


@contextlib.contextmanager
def board(tracker: str, key: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    port = free_port()
    ports = ("--port", str(port), "--port-end", str(port + 1))
    with running("rpc_server", *ports, "--tracker", tracker, "--key", key, **environment) as server:
        yield server


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    """A tracker with 'full', a whole TVM on one thread, and 'small', the runtime alone, that has no LLVM to ask."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    with running("rpc_tracker", "--port", str(port), "--port-end", str(port + 1)):
        until(lambda: keys(address) is not None)  # a server that finds none sleeps for five seconds
        with board(address, "full", TVM_NUM_THREADS="1"), board(address, "small", TVM_USE_RUNTIME_LIB="1"):
            until(lambda: keys(address) == ["full", "small"])
            yield address


Lend = Callable[..., Board]


@pytest.fixture
def lend(tracker: str) -> Iterator[Lend]:
    """A board by its key, given back after the test."""
    with contextlib.ExitStack() as lent:
        yield lambda key, **options: lent.enter_context(contextlib.closing(Board(tracker, key, **options)))


# It runs there as here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["full", "small"])
def test_a_board_computes_what_this_machine_does(
    key: str, lend: Lend, small_artifact: Path, rng: np.random.Generator
) -> None:
    """The boards are this machine, so not a bit may differ."""
    here, there = Session(small_artifact), lend(key).open(small_artifact)
    assert session.verify(there) == session.verify(here)
    for _ in range(5):
        x = rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32)
        np.testing.assert_array_equal(there.run({"x": x})["y"], here.run({"x": x})["y"])
    assert 0 < there.seconds({"x": x}, 5) < 1


def test_several_outputs(lend: Lend, tmp_path: Path, rng: np.random.Generator) -> None:
    onnx = pytest.importorskip("onnx")
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(rng.normal(0, 1, (6, 4)).astype(np.float32), "w")
    graph = onnx.helper.make_graph(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])],
        "two",
        [tensor("x", 1, [1, 6])],
        [tensor("h", 1, [1, 4]), tensor("y", 1, [1, 4])],
        [weight],
    )
    versions = {"opset_imports": [onnx.helper.make_opsetid("", 20)], "ir_version": 10}
    onnx.save(onnx.helper.make_model(graph, **versions), tmp_path / "two.onnx")
    compile_network(tmp_path / "two.onnx", tmp_path / "two", targets.host(), 1)
    there = lend("full").open(tmp_path / "two")
    assert session.verify(there).passed
    x = rng.normal(0, 1, (1, 6)).astype(np.float32)
    outputs = there.run({"x": x})
    np.testing.assert_array_equal(outputs["y"], np.maximum(outputs["h"], 0))


def test_the_commands(crossbit: Crossbit, tracker: str, small_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    there = ("--rpc", tracker, "--key", "full")
    name = f"board 'full' of tracker {tracker}"
    here = crossbit("verify", small_artifact, "--json").json
    verified = crossbit("verify", small_artifact, *there, "--json")
    unknown = "has TVM's own server, which knows neither all that its CPU lacks nor whether it is emulated: code for "
    assert verified.code == 0
    assert verified.err == f"{name} {unknown}another CPU ends it\n"
    assert verified.json == here | {"board": name, "emulated": None}
    assert f"verified {small_artifact} on {name}, over RPC: " in crossbit("verify", small_artifact, *there).out
    file = tmp_path / "bench.json"
    timed = crossbit("bench", small_artifact, small_artifact, *there, "--rounds", 3, "--json", "-o", file)
    assert (timed.code, timed.err) == (0, verified.err)
    result = Bench.model_validate_json(file.read_text())
    assert result.emulated is None
    assert timed.json == result.model_dump(mode="json")
    assert result.board == name
    assert [m.error for m in result.measurements] == [here["error"]] * 2
    assert all(0 < m.p10_us <= m.median_us for m in result.measurements)
    assert f"{result.cpu} on {name}, over RPC, 1 thread" in crossbit("bench", small_artifact, *there).out


def test_two_sessions_of_a_board_take_turns(lend: Lend, small_artifact: Path) -> None:
    """There is one connection: a second thread is refused, not let in between a question and its answer."""
    full = lend("full")
    first, second = full.open(small_artifact), full.open(small_artifact)
    inputs, _ = artifact.golden(small_artifact)
    timing = threading.Thread(target=first.seconds, args=(inputs, 20_000))
    timing.start()
    until(full.lock.locked)
    with pytest.raises(RuntimeError, match="this session is running in another thread"):
        second.run(inputs)
    timing.join()
    np.testing.assert_array_equal(second.run(inputs)["y"], first.run(inputs)["y"])


# What fails, fails with a sentence ---------------------------------------------------------------------------------


def test_an_unknown_key(tracker: str) -> None:
    with pytest.raises(ValueError, match=f"tracker {tracker} knows no board 'none', but full, small$"):
        Board(tracker, "none")


@pytest.mark.parametrize("address", ["here", ":9190", "127.0.0.1:", "127.0.0.1:port"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError, match=f"'{address}' is no address of a tracker; write HOST:PORT"):
        Board(address, "full")


@pytest.mark.parametrize("what", ["nothing", "silence", "another program", "no port", "no host"])
def test_no_tracker(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remote._ANSWER", 0.3)
    server, port = listen()
    address = {"no port": "127.0.0.1:70000", "no host": "nowhere.invalid:9190"}.get(what, f"127.0.0.1:{port}")
    if what == "nothing":
        server.close()
    elif what == "another program":
        threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n")).start()
    with server, pytest.raises(ConnectionError, match=f"there is no TVM tracker at {address} .*; `python -m tvm.exec"):
        Board(address, "full")


def test_a_busy_board(lend: Lend, tracker: str) -> None:
    holder = lend("full")
    with pytest.raises(TimeoutError, match=rf"board 'full' of tracker {tracker} was busy for 0\.2 seconds; try again"):
        lend("full", wait=0.2)
    holder.close()
    lend("full")


def test_features_are_the_boards(lend: Lend, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is not asked: without any feature and of another make, it may send a library to a board."""
    lacking = [f for name in targets.names() for f in targets.load(name).missing_features() if " " not in f]
    monkeypatch.setattr(session, "cpu_features", frozenset)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    full = lend("full")
    assert session.verify(full.open(copied)).passed
    if not lacking:
        pytest.skip("this CPU has the features of every target")
    change(copied, features=[*artifact.read(copied).features, lacking[0]])
    with pytest.raises(ValueError, match=rf"board 'full' .* lacks {lacking[0]}; compile with a --target of that board"):
        full.open(copied)


@pytest.mark.skipif(targets.host().machine != "x86_64", reason="the machine's name is in the sentences")
@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("full", r"compiled for \S+ on aarch64, and board 'full' of tracker {} is x86_64"),
        ("small", r"compiled for \S+, and board 'small' of tracker {} cannot load it \(.*\)"),
    ],
)
def test_a_board_of_another_machine(key: str, reason: str, lend: Lend, tracker: str, copied: Path) -> None:
    as_machine(copied, 183)
    change(copied, machine="aarch64")
    with pytest.raises(ValueError, match=f"copied: {reason.format(tracker)}; compile with a --target of that board"):
        lend(key).open(copied)


def test_a_server_of_too_few_threads(lend: Lend, small_model: Path, tmp_path: Path) -> None:
    compile_network(small_model, tmp_path / "two", targets.host(), threads=2)
    with pytest.raises(ValueError, match=r"for 2 threads, and the server of board 'full' .* has 1; start it with TVM"):
        lend("full").open(tmp_path / "two")


def test_a_board_that_vanishes(tracker: str, small_artifact: Path) -> None:
    inputs, _ = artifact.golden(small_artifact)
    with board(tracker, "doomed") as server:
        until(lambda: "doomed" in (keys(tracker) or []))
        loaded = Board(tracker, "doomed").open(small_artifact)
        loaded.run(inputs)
        threading.Timer(0.5, end, [server]).start()
        for call in (lambda: loaded.seconds(inputs, 1_000_000), lambda: loaded.run(inputs)):
            with pytest.raises(ConnectionError, match=f"board 'doomed' of tracker {tracker}: went away .*; start the"):
                call()
    until(lambda: "doomed" not in (keys(tracker) or []))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("verify ARTIFACT --rpc TRACKER", "--rpc HOST:PORT (of a tracker) and --key KEY (of a board) go together"),
        ("bench ARTIFACT --key full", "--rpc HOST:PORT (of a tracker) and --key KEY (of a board) go together"),
        ("verify ARTIFACT --rpc TRACKER --key none", "knows no board 'none', but full, small"),
        ("bench ARTIFACT --rpc 127.0.0.1:1 --key full", "there is no TVM tracker at 127.0.0.1:1 ([Errno 111]"),
        (
            "bench ARTIFACT --onnx m.onnx --rpc TRACKER --key full",
            "m.onnx: ONNX Runtime runs on this machine, not on b",
        ),
        ("bench ARTIFACT --profile --rpc TRACKER --key full", "--profile does not reach board 'full'"),
    ],
)
def test_wrong_commands(
    command: str,
    sentence: str,
    crossbit: Crossbit,  # noqa: F811
    tracker: str,
    small_artifact: Path,
) -> None:
    words = {"ARTIFACT": str(small_artifact), "TRACKER": tracker}
    result = crossbit(*(words.get(word, word) for word in command.split()))
    assert (result.code, result.out) == (2, "")
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and sentence in line


def test_single_kernels_are_not_timed_there(lend: Lend, small_artifact: Path) -> None:
    with pytest.raises(ValueError, match=r"kernels of board 'full' of tracker .* cannot be timed: a callback does it"):
        lend("full").open(small_artifact).kernel_seconds({}, 1)
