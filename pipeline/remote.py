"""An artifact running on a board that registered at a TVM tracker.

A board runs the server of `pipeline.board`, or TVM's own, ``python -m tvm.exec.rpc_server --tracker HOST:PORT --key
KEY``; the tracker lends it to one client at a time. What leaves this machine is the library and the inputs, what comes
back are outputs and times. TVM's protocol knows neither passwords nor encryption, and runs what it is sent: for a
trusted network only.
"""

from __future__ import annotations

import itertools
import re
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm

import targets
from pipeline import artifact
from pipeline.session import ALL_CORES, Session, exclusive

_ANSWER = 5.0  # seconds that a tracker has to answer; it does no work


class Board:
    """A board lent by a tracker, until it is closed.

    Args:
        tracker: 'HOST:PORT'.
        wait: seconds to wait for a board that another client uses.

    Attributes:
        machine: 'aarch64', 'armv7l', ...; '' where the server does not know.
        cpu: the core's name and the board's, as far as the server knows; else ''.
        emulated: whether it is; None where its server does not know.
        unknown: what its server, TVM's own, cannot say, as a sentence; None where it says all.

    Raises:
        ValueError: an address that is none, or a key that no board has.
        OSError: no tracker there, no free board, or it cannot be reached.
    """

    def __init__(self, tracker: str, key: str, wait: float = 30.0) -> None:
        self._name = board_name(tracker, key)
        host, port, match_key = request(tracker, key, wait)
        with self.errors():
            self._remote = tvm.rpc.connect(host, port, match_key)
            self.device = self._remote.cpu()
            info = self._answer("crossbit.board_info")
            if info is None:  # TVM's own server
                self.machine = str(self._answer("target.llvm_get_system_triple") or "").split("-")[0]
                self.cpu = str(self._answer("target.llvm_get_system_cpu") or "")
                self.emulated, self._features = None, None
                what = "all that its CPU lacks" if self.machine else "what its CPU is or lacks"
                self.unknown: str | None = (
                    f"{self} has TVM's own server, which knows neither {what} nor whether it is emulated: "
                    f"code for another CPU ends it"
                )
            else:
                self.unknown = None
                facts = dict(line.split("=", 1) for line in str(info).splitlines())
                self.machine, self.emulated = facts["machine"], facts["emulated"] == "yes"
                self.cpu = " ".join(filter(None, (_core(facts["part"]), facts["model"]))) or self.machine
                self._features = frozenset(facts["features"].split())
        self.lock = threading.Lock()  # one connection, however many sessions
        self._uploads = itertools.count()

    def __str__(self) -> str:
        return self._name

    def close(self) -> None:
        """Give the board back; its sessions are of no more use."""
        self.function("CloseRPCConnection")()

    def open(self, folder: Path) -> RemoteSession:
        """An artifact of this machine, running there.

        Raises:
            ValueError: as `Session`, about the board's CPU.
            OSError: the board went away.
        """
        return RemoteSession(folder, self)

    def function(self, name: str) -> Any:
        """A global function of the board's TVM.

        Raises:
            AttributeError: it has none of that name.
        """
        return self._remote.get_function(name)

    def mismatch(self, machine: str, features: Iterable[str]) -> str | None:
        """Why code for a machine and with features does not run there: '... is armv7l'; None if it does."""
        if not machine.startswith(self.machine):  # 'armv7l' is LLVM's 'arm' or 'armv7'
            return f"{self} is {self.machine}"
        missing = self.lacks(features)
        return f"{self} lacks {', '.join(missing)}" if missing else None

    def lacks(self, features: Iterable[str]) -> list[str]:
        """Those that the board does not have; of a board with TVM's own server, those that its LLVM denies."""
        if self._features is not None:
            return sorted(set(features) - self._features)
        known = self._answer("tvm.codegen.llvm.GetHostCPUFeatures")
        text = self.function("ffi.ReprPrint")(known) if known is not None else ""
        denied = re.findall(r'"([^"]+)": T\.bool\(False\)', text)
        return sorted(name for name in features if name.replace("_", "") in denied)  # Linux has a '_' more than LLVM

    def load(self, library: Path) -> tvm.runtime.Module:
        """Send a library and load it there."""
        # Each under a name of its own: a file that is loaded must not be written over.
        name = f"{next(self._uploads)}.so"
        self._remote.upload(str(library), name)
        return self._remote.load_module(name)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Make sentences of what the connection raises."""
        try:
            yield
        except tvm.error.RPCError as error:  # from code that ran on the board
            raise ValueError(f"{self}: {_last_line(error)}") from error
        except tvm.error.InternalError as error:  # from the socket
            raise ConnectionError(
                f"{self}: went away ({_last_line(error)}), because its server was ended or its session died, which the "
                f"server's own lines tell; start the server again if it was"
            ) from error

    def _answer(self, name: str) -> Any:
        """What a function without arguments returns, None where the server has none of that name."""
        try:
            return self.function(name)()
        except AttributeError:
            return None


class RemoteSession(Session):
    """A `Session` whose library runs on a board. Times are the board's own, without the network."""

    def __init__(self, folder: Path, board: Board) -> None:
        self._board = board
        super().__init__(folder)

    def _load(self) -> None:
        board, manifest = self._board, self.manifest
        if manifest.gpus:
            raise ValueError(f"{self.folder}: compiled for a GPU, which {board} cannot reach; verify and bench there")
        self._lock = board.lock
        self._device = board.device
        if manifest.emit != "vm":
            raise ValueError(
                f"{self.folder}: a C library runs in an app, not over RPC; compile with --emit vm for {board}"
            )
        advice = "compile with a --target of that board"
        with board.lock, board.errors():
            if reason := board.mismatch(manifest.machine, manifest.features):
                raise ValueError(
                    f"{self.folder}: compiled for {manifest.target} on {manifest.machine}, and {reason}; {advice}"
                )
            try:
                library = board.load(self.folder / artifact.LIBRARY)
            except tvm.error.RPCError as error:
                raise ValueError(
                    f"{self.folder}: compiled for {manifest.target}, and {board} cannot load it "
                    f"({_last_line(error)}); {advice}"
                ) from error
            self._machine = tvm.runtime.vm.VirtualMachine(library, self._device)
            self._configure = board.function("runtime.config_threadpool")
            self._configure(ALL_CORES, manifest.threads)
            if (threads := board.function("runtime.NumThreads")()) < manifest.threads:
                raise ValueError(
                    f"{self.folder}: compiled for {manifest.threads} threads, and the server of {board} has {threads}; "
                    f"start it with TVM_NUM_THREADS={manifest.threads} in its environment"
                )

    def _call(self, tensors: list[tvm.runtime.Tensor]) -> Any:
        # In steps, because a call over RPC cannot return a tuple.
        self._machine.set_input("main", *tensors)
        self._machine.invoke_stateful("main")
        return self._machine.get_outputs("main")

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._board.errors():
            return super().run(inputs)

    def seconds(self, inputs: dict[str, np.ndarray], calls: int) -> float:
        with self._board.errors():
            return self._seconds(inputs, calls)

    @exclusive
    def _seconds(self, inputs: dict[str, np.ndarray], calls: int) -> float:
        self._machine.set_input("main", *self._tensors(inputs))
        evaluator = self._machine.time_evaluator("invoke_stateful", self._device, number=calls)
        return float(evaluator("main").mean)

    def kernel_seconds(self, inputs: dict[str, np.ndarray], calls: int) -> dict[str, float]:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(f"kernels of {self._board} cannot be timed: a callback does it, and RPC carries none")


def _core(part: str) -> str:
    """The name of a core by ARM's number of it, or the number."""
    known = (targets.load(name) for name in targets.names())
    return next((target.cpu for target in known if part and target.cpu_part == part), part)


def board_name(tracker: str, key: str) -> str:
    """What messages call a board."""
    return f"board '{key}' of tracker {tracker}"


def is_there(tracker: str, key: str) -> bool:
    """Whether the tracker answers and has such a board."""
    try:
        connection, keys = _tracker(tracker)
    except OSError:
        return False
    connection.close()
    return key in keys


def request(tracker: str, key: str, wait: float) -> tuple[str, int, str]:
    """Host, port and one-time key of a board, by the tracker's protocol: TVM's client would wait for ever.

    Raises:
        ValueError, OSError: as `Board`.
    """
    from tvm.rpc.base import TrackerCode, recvjson, sendjson

    connection, keys = _tracker(tracker)
    with connection:
        if key not in keys:
            raise ValueError(f"tracker {tracker} knows no board '{key}', but {', '.join(keys) or 'none at all'}")
        sendjson(connection, [TrackerCode.REQUEST, key, "", 1])
        connection.settimeout(wait)
        try:
            _, (host, port, match_key) = recvjson(connection)
        except TimeoutError:
            busy = f"{board_name(tracker, key)} was busy for {wait:g} seconds; try again later"
            raise TimeoutError(busy) from None
        except OSError as error:
            raise ConnectionError(f"tracker {tracker} went away ({error}); start it again") from error
    return host, port, match_key


def _tracker(address: str) -> tuple[socket.socket, list[str]]:
    """A connection to the tracker, and the keys of the boards it has."""
    from tvm.rpc.base import RPC_TRACKER_MAGIC, TrackerCode, recvall, recvjson, sendjson

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"'{address}' is no address of a tracker; write HOST:PORT")
    hello = struct.pack("<i", RPC_TRACKER_MAGIC)
    try:
        connection = socket.create_connection((host, int(port)), _ANSWER)
        connection.sendall(hello)
        if recvall(connection, len(hello)) != hello:
            raise OSError("another program answers")
        sendjson(connection, [TrackerCode.SUMMARY])
        _, summary = recvjson(connection)
    except (OSError, OverflowError) as error:  # a port beyond 65535 overflows
        start = "`python -m tvm.exec.rpc_tracker` starts one"
        raise ConnectionError(f"there is no TVM tracker at {address} ({error}); {start}") from error
    return connection, sorted({server["key"].removeprefix("server:") for server in summary["server_info"]})


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
