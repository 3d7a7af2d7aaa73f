"""The server of boards on emulated ARM cores: whole networks, tuning, and everything that can go wrong with a board."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import machines
import numpy as np
import pytest
from networks import dyadic, randomise
from test_artifact import change
from test_cli import Crossbit, crossbit  # noqa: F401
from test_remote import end, free_port, keys, running, until
from torch import nn

import targets
from pipeline import board as boards
from pipeline import compiler, emulator, importer, remote, session, toolchain, tune
from pipeline.bench import Bench
from pipeline.export import export
from pipeline.layers import QuantConv2d
from pipeline.packaging import compile_network, oracle
from pipeline.remote import Board
from targets import Target

pytestmark = pytest.mark.slow  # builds the servers once a machine and version: a minute each; later runs find them
pytest.importorskip("tornado", reason="TVM's tracker needs it")

BOARDS = ("cortex-a53", "cortex-a72", "cortex-a7")


def built(name: str) -> Path:
    """The server for a target; the test is skipped where it cannot be built and run here."""
    target = targets.load(name)
    machines.need(target)
    try:
        toolchain.find_cxx(target)
        emulator.check_c_library(target)
    except ValueError as error:
        pytest.skip(str(error))
    return boards.build(target)


@contextlib.contextmanager
def emulated(name: str, tracker: str, key: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command that runs a board here, registered; its lines go to ``folder``/KEY.log, its files to ``folder``."""
    built(name)
    arguments = ("board", "--target", name, "--emulate", "--tracker", tracker, "--key", key)
    with (folder / f"{key}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            env=os.environ | {"TMPDIR": str(folder)},
            stderr=log,
            stdout=log,
            start_new_session=True,
        )
    try:
        until(lambda: key in (keys(tracker) or []))
        yield process
    finally:
        end(process)


@contextlib.contextmanager
def tracking(port: int) -> Iterator[str]:
    address = f"127.0.0.1:{port}"
    with running("rpc_tracker", "--port", str(port), "--port-end", str(port + 1)):
        until(lambda: keys(address) is not None)
        yield address


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    with tracking(free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boards")


@pytest.fixture(scope="module")
def lab(tracker: str, logs: Path) -> Iterator[str]:
    """A tracker with one emulated board for each of `BOARDS`, under its target's name."""
    with contextlib.ExitStack() as stack:
        for name in BOARDS:
            stack.enter_context(emulated(name, tracker, name, logs))
        yield tracker
        until(lambda: not any(f.is_dir() for f in logs.iterdir()))  # sessions take their folders with them


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file whose one binary convolution writes bits and whose other writes floats."""
    network = nn.Sequential(
        nn.BatchNorm2d(32),
        QuantConv2d(32, 64, 3, padding=1, group=16),
        nn.BatchNorm2d(64),
        QuantConv2d(64, 32, 1, group=16),
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(randomise(network, np.random.default_rng(0)), (32, 8, 8), path)
    return path


@pytest.fixture(scope="module")
def compiled(model: Path) -> Callable[[str], Path]:
    """`model` compiled for a target. Read it, do not write to it."""

    def compile_for(name: str) -> Path:
        folder = model.parent / name
        if not folder.exists():
            compile_network(model, folder, targets.load(name), 1)
        return folder

    return compile_for


Compiled = Callable[[str], Path]


@contextlib.contextmanager
def lent(tracker: str, key: str) -> Iterator[Board]:
    with contextlib.closing(Board(tracker, key)) as board:
        yield board


# It runs there as here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cortex-a72", "cortex-a7"])
def test_a_whole_network_is_exact(
    name: str, lab: str, compiled: Compiled, model: Path, rng: np.random.Generator
) -> None:
    runtime = oracle(model)
    with lent(lab, name) as board:
        there = board.open(compiled(name))
        assert session.verify(there).error == 0
        for _ in range(3):
            x = dyadic(rng, (1, 32, 8, 8))
            np.testing.assert_array_equal(there.run({"x": x})["y"], runtime.run(None, {"x": x})[0])


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_knows_what_it_is(name: str, lab: str) -> None:
    target = targets.load(name)
    with lent(lab, name) as board:
        assert (board.machine, board.emulated) == (target.machine, True)
        # The number of a 32-bit core is known from /proc/cpuinfo alone, which under QEMU is another machine's.
        assert board.cpu == (name if target.machine == "aarch64" else "armv7l")
        assert board.mismatch(target.machine, target.features) is None
        assert board.lacks(["flying", *target.features]) == ["flying"]


def test_the_commands(crossbit: Crossbit, lab: str, compiled: Compiled, tmp_path: Path) -> None:  # noqa: F811
    there = ("--rpc", lab, "--key", "cortex-a7")
    folder = compiled("cortex-a7")
    name = f"board 'cortex-a7' of tracker {lab}"
    verified = crossbit("verify", folder, *there, "--json")
    assert (verified.code, verified.err) == (0, "")
    assert (verified.json["board"], verified.json["emulated"], verified.json["error"]) == (name, True, 0)
    assert f"on {name}, over RPC, emulated: largest error 0" in crossbit("verify", folder, *there).out
    file = tmp_path / "bench.json"
    timed = crossbit("bench", folder, *there, "--rounds", 3, "-o", file)
    assert (timed.code, timed.err) == (0, "")
    result = Bench.model_validate_json(file.read_text())
    assert (result.emulated, result.board, result.cpu) == (True, name, "armv7l")
    assert "EMULATED: these times say nothing about the CPU" in " ".join(timed.out.split())


def test_a_server_for_a_board(crossbit: Crossbit, tmp_path: Path) -> None:  # noqa: F811
    built("cortex-a72")
    done = crossbit("board", "--target", "cortex-a72", "-o", tmp_path, "--tracker", "10.0.0.1:9333", "--key", "rpi4")
    assert (done.code, done.err) == (0, "")
    server = tmp_path / boards.SERVER
    assert server.stat().st_size < 5_000_000 and os.access(server, os.X_OK)
    assert f"{server}: {server.stat().st_size:,} bytes for aarch64, glibc 2." in done.out
    for step in (
        "python -m tvm.exec.rpc_tracker --port 9333",
        f"scp {server} USER@BOARD:",
        "./crossbit-board --tracker ADDRESS-OF-THIS-MACHINE:9333 --key rpi4",
        "crossbit verify ARTIFACT --rpc 10.0.0.1:9333 --key rpi4",
    ):
        assert step in done.out
    steps: list[int] = []
    boards.build(targets.load("cortex-a53"), lambda done, total: steps.append(done))
    assert steps == []  # one server for all of a machine's cores


# What fails, fails with a sentence ---------------------------------------------------------------------------------


def test_what_a_board_cannot_run_is_refused(lab: str, compiled: Compiled) -> None:
    with (
        lent(lab, "cortex-a7") as board,
        pytest.raises(ValueError, match=r"cortex-a72 on aarch64, and .* is armv7l; com"),
    ):
        board.open(compiled("cortex-a72"))
    with (
        lent(lab, "cortex-a53") as board,
        pytest.raises(ValueError, match=r"compiled for cortex-a76 .* lacks asimddp, "),
    ):
        board.open(compiled("cortex-a76"))


def test_an_illegal_instruction_ends_the_session_and_not_the_server(
    lab: str, compiled: Compiled, tmp_path: Path, logs: Path
) -> None:
    """Dot products on a core without them, with a manifest that lies."""
    folder = Path(shutil.copytree(compiled("cortex-a76"), tmp_path / "liar"))
    change(folder, features=["asimd"])
    board = Board(lab, "cortex-a53")
    there = board.open(folder)
    with pytest.raises(
        ValueError, match=r"^board 'cortex-a53' of .*: illegal instruction \(SIGILL\): the library has one"
    ):
        session.verify(there)
    with pytest.raises(ConnectionError, match=r"^board 'cortex-a53' of .*: went away"):
        session.verify(there)
    with lent(lab, "cortex-a53") as again:
        assert session.verify(again.open(compiled("cortex-a53"))).error == 0
    assert re.search(
        r"session \d+ over after \S+ s: illegal instruction \(SIGILL\)", (logs / "cortex-a53.log").read_text()
    )


def test_a_session_that_takes_too_long_is_ended(lab: str) -> None:
    import tvm

    host, port, key = remote.request(lab, "cortex-a53", 30)
    slow = tvm.rpc.connect(host, port, key, session_timeout=1)
    cpu = slow.cpu()
    assert threading.Event().wait(2.5) is False
    with pytest.raises(tvm.error.RPCError, match="more than the 1 seconds that it asked for"):
        tvm.runtime.empty((1,), device=cpu)
    with lent(lab, "cortex-a53") as board:
        assert board.machine == "aarch64"


def test_a_board_that_is_killed_is_named(
    tracker: str, compiled: Compiled, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = {"x": dyadic(rng, (1, 32, 8, 8))}
    with emulated("cortex-a72", tracker, "doomed", tmp_path) as server:
        there = Board(tracker, "doomed").open(compiled("cortex-a72"))
        there.run(x)
        threading.Timer(0.5, end, [server]).start()
        for call in (lambda: there.seconds(x, 1_000_000), lambda: there.run(x)):
            with pytest.raises(ConnectionError, match=f"board 'doomed' of tracker {tracker}: went away .*; start the"):
                call()
    until(lambda: "doomed" not in (keys(tracker) or []))


def test_ctrl_c_ends_a_server_in_a_session(tracker: str, tmp_path: Path) -> None:
    with emulated("cortex-a72", tracker, "short", tmp_path) as server:
        Board(tracker, "short")
        assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 1
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(30) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["short.log"]
    assert "board 'short' ended" in (tmp_path / "short.log").read_text()


def test_a_server_finds_its_tracker_again(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        with tracking(port) as address:
            stack.enter_context(emulated("cortex-a72", address, "loyal", tmp_path))
        with tracking(port):
            until(lambda: "loyal" in (keys(address) or []))
            with lent(address, "loyal") as board:
                assert board.machine == "aarch64"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--tracker", "here:1"),
        ("--key", "a b", "--tracker", "here:1"),
        ("--key", "a", "--tracker", "here:x"),
        ("-h",),
    ],
)
def test_the_server_says_how_to_start_it(arguments: tuple[str, ...]) -> None:
    server = built("cortex-a72")
    done = machines.run(targets.load("cortex-a72"), server, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: write crossbit-board --tracker HOST:PORT --key KEY")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("board --target cortex-a72", "give -o FOLDER to build the server for a board, or --emulate to run it here"),
        ("board --target cortex-a72 --emulate -o x", "give -o FOLDER to build the server for a board, or --emulate"),
        ("board --target x86-avx2 --emulate", "no emulator for target x86-avx2: only aarch64 and armv7l CPUs are"),
        ("board --target cortex-m4 -o x", "target cortex-m4 has no operating system to run a server"),
        ("tune m.onnx --rpc 127.0.0.1:1", "--rpc HOST:PORT (of a tracker) and --key KEY (of a board) go together"),
    ],
)
def test_wrong_commands(command: str, sentence: str, crossbit: Crossbit, model: Path) -> None:  # noqa: F811
    result = crossbit(*(str(model) if word == "m.onnx" else word for word in command.split()))
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and sentence in line


# TVM's own server ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stock(tracker: str, key: str, loads: str = "") -> Iterator[None]:
    """TVM's server in an emulated Python, as a Cortex-A72; it loads a library of TVM's."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossbit"
    folder = cache / f"board-python-{version('apache-tvm')}-{version('apache-tvm-ffi')}"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing, an aarch64 Python with TVM: run `scripts/setup cross`")
    machines.need(targets.load("cortex-a72"))
    port = free_port()
    address = ("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), "--tracker", tracker)
    loading = ("--load-library", str(folder / "site" / "tvm" / "lib" / loads)) if loads else ()
    command = [folder / "python", "-m", "tvm.exec.rpc_server", *address, "--key", key, "--silent", *loading]
    process = subprocess.Popen(command, env=os.environ | {"QEMU_CPU": "cortex-a72"}, start_new_session=True)
    try:
        until(lambda: key in (keys(tracker) or []))
        yield
    finally:
        end(process)


def test_the_python_server_of_tvm(
    crossbit: Crossbit,  # noqa: F811
    tracker: str,
    model: Path,
    compiled: Compiled,
    tmp_path: Path,
) -> None:
    """It does all that ours does, but knows less, and says so."""
    there, name = ("--rpc", tracker, "--key", "stock"), f"board 'stock' of tracker {tracker}"
    unknown = f"{name} has TVM's own server, which knows neither what its CPU is or lacks nor whether it is emulated: "
    with stock(tracker, "stock"):
        verified = crossbit("verify", compiled("cortex-a72"), *there, "--json")
        assert (verified.code, verified.json["error"], verified.json["emulated"]) == (0, 0, None)
        assert verified.err == f"{unknown}code for another CPU ends it\n"
        tune_there = ("tune", model, "--target", "cortex-a72", "--trials", 2, "--records", tmp_path, *there)
        refused = crossbit(*tune_there)
        assert refused.code == 2
        assert (
            f"{name} cannot make inputs to measure with: start its server without TVM_USE_RUNTIME_LIB, or"
            in refused.err
        )
        with lent(tracker, "stock") as board, pytest.raises(ConnectionError, match=f"^{name}: went away .* died"):
            session.verify(board.open(compiled("cortex-a76")))  # dot products, which nothing could refuse
        until(lambda: "stock" not in (keys(tracker) or []))
    with stock(tracker, "stock", loads="libtvm_runtime_extra.so"):
        tuned_there = crossbit(*tune_there, "--json")
    assert tuned_there.code == 0
    assert unknown in tuned_there.err
    assert [(k["unit"], k["trials"]) for k in tuned_there.json] == [("us", 2)] * 2


# Tuning ------------------------------------------------------------------------------------------------------------


def tuned(model: Path, target: Target, records: Path, trials: int, **options: object) -> list[tune.Tuned]:
    lowered = compiler.lower(importer.load(model, 1, target))
    return tune.tune(lowered, target, 1, records, trials, 0, **options)  # type: ignore[arg-type]


def test_tuning_on_a_board(lab: str, model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    target, said = targets.load("cortex-a72"), list[str]()
    records = tune.records_folder(tmp_path, target, 1)
    found = tuned(model, target, records, 4, warn=said.append, board=(lab, "cortex-a72"))
    assert {k.kernel for k in found} == {"bitserial_conv2d", "bitserial_conv2d_bits"}
    for kernel in found:
        assert kernel.unit == "us"
        assert 0 < kernel.best <= kernel.default < 1e7
        assert 2 <= kernel.trials <= 4
    assert said == [
        f"board 'cortex-a72' of tracker {lab} is emulated: the records will not say what is fast on a cortex-a72"
    ]
    manifest = compile_network(model, tmp_path / "tuned", target, 1, records=records)
    assert manifest.tuned_kernels == 2
    with lent(lab, "cortex-a72") as board:
        assert session.verify(board.open(tmp_path / "tuned")).error == 0


def test_tuning_on_a_board_that_is_killed_keeps_what_was_found(tracker: str, model: Path, tmp_path: Path) -> None:
    target, said = targets.load("cortex-a72"), list[str]()
    with emulated("cortex-a72", tracker, "mortal", tmp_path) as server:

        def kill(kernel: str, done: int, total: int) -> None:
            end(server)
            until(lambda: "mortal" not in (keys(tracker) or []))

        gone = (
            rf"^board 'mortal' of tracker {tracker} went away: tracker {tracker} knows no board 'mortal', but .*; what"
        )
        with pytest.raises(ValueError, match=f"{gone} was found before is kept$"):
            tuned(model, target, tmp_path / "records", 2, on_trial=kill, warn=said.append, board=(tracker, "mortal"))
    assert "candidate for bitserial_conv2d" in said[-1] and "failed on board 'mortal'" in said[-1]
    (record,) = (tmp_path / "records" / "database_tuning_record.json").read_text().splitlines()
    assert all(0 < seconds < 1 for seconds in json.loads(record)[1][1])


def test_a_target_that_a_board_is_not(lab: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"target cortex-a76 cannot be measured there: board 'cortex-a53' of .* lacks asimddp"
    ):
        tuned(model, targets.load("cortex-a76"), tmp_path / "records", 2, board=(lab, "cortex-a53"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [[1.0, -1.0], [0.0], [1e-3, float("nan")], [float("inf")], [1e6]])
def test_times_that_cannot_be_are_not_believed(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm.s_tir.meta_schedule.runner.utils.run_evaluator_common", lambda *_: times)
    with pytest.raises(ValueError, match="it says that a call took"):
        tune._time(None, None, None, None)
