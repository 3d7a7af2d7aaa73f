"""The RPC server of boards: built here from the sources that TVM's wheels carry, copied there as one file.

TVM's own server is Python with all of TVM: 110 MB of wheels, and none for 32-bit ARM. This one is TVM's runtime, its
RPC and its virtual machine with `board/server.cc`. What the wheels lack of headers is in `board/include`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from pipeline import emulator, toolchain
from targets import Target, cores

SERVER = "crossbit-board"
_OURS = Path(__file__).with_name("board")

# Sources by the package and folder they are in. A unit is compiled as one file: most of the time goes into headers.
_UNITS = {
    "ffi": (
        "tvm_ffi/src/ffi",
        "object error function tensor dtype container init_once custom_allocator backtrace",
    ),
    "ffi_extra": (
        "tvm_ffi/src/ffi/extra",
        "module library_module library_module_dynamic_lib library_module_system_lib env_context env_c_api json_parser "
        "json_writer",
    ),
    "runtime": (
        "tvm/src/runtime",
        "device_api cpu_device_api tensor module thread_pool threading_backend workspace_pool file_utils logging timer "
        "memory/memory_manager",
    ),
    "rpc": (
        "tvm/src/runtime/rpc",
        "rpc_channel rpc_device_api rpc_endpoint rpc_local_session rpc_module rpc_server_env rpc_session "
        "rpc_socket_impl",
    ),
    "vm": ("tvm/src/runtime/vm", "vm bytecode executable builtin"),
}
_FLAGS = (
    *("-std=c++17", "-Os", "-fPIC", "-w", "-ffunction-sections", "-fdata-sections", "-DNDEBUG"),
    # Only what TVM exports is seen by the libraries that clients send.
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-DTVM_FFI_EXPORTS", "-DTVM_RUNTIME_EXPORTS"),
    *("-DTVM_FFI_USE_LIBBACKTRACE=0", "-DTVM_FFI_BACKTRACE_ON_SEGFAULT=0", "-DTVM_THREADPOOL_USE_OPENMP=0"),
)
_LINK = ("-rdynamic", "-static-libstdc++", "-static-libgcc", "-Wl,--gc-sections", "-s", "-ldl", "-lpthread", "-lm")


def build(target: Target, on_step: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The server for the machine of ``target``, any of its CPUs; built once and then found again.

    Args:
        on_step: called with the files compiled and in all.

    Raises:
        ValueError: no C++ compiler for the target, a compiler that fails, or wheels without sources.
    """
    if not target.tvm_runtime:
        raise ValueError(f"target {target.name} has no operating system to run a server; it takes C source")
    tools = toolchain.find_cxx(target)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossbit"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"board-{target.machine}-{_digest(tools)}"
    with (cache / "board.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first, and then finds what it made
        if not folder.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=".board-", dir=cache))
            try:
                made = _compile(tools, scratch, on_step)
                (scratch / "made").mkdir()
                made.rename(scratch / "made" / SERVER)
                (scratch / "made").rename(folder)
            finally:
                shutil.rmtree(scratch)
    return folder / SERVER


def _compile(tools: toolchain.Toolchain, scratch: Path, on_step: Callable[[int, int], None]) -> Path:
    # TVM's sources name the headers of include/tvm/support by their place in its repository.
    (scratch / "runtime" / "rpc").mkdir(parents=True)
    (scratch / "support").symlink_to(_OURS / "include" / "tvm" / "support")
    includes = (_OURS / "include", _package("tvm") / "include", _package("tvm_ffi") / "include")
    searched = (*includes, scratch / "runtime", scratch / "runtime" / "rpc")
    sources = [_OURS / "server.cc"]
    for unit, (place, names) in _UNITS.items():
        package, _, folder = place.partition("/")
        files = [_package(package) / folder / f"{name}.cc" for name in names.split()]
        if lacking := [file for file in files if not file.is_file()]:
            raise ValueError(f"the {package} that is installed lacks {lacking[0].name}: install its wheel from PyPI")
        sources.append(scratch / f"{unit}.cc")
        sources[-1].write_text("".join(f'#include "{file}"\n' for file in files))
    objects = [str(scratch / f"{source.stem}.o") for source in sources]
    flags = (*_FLAGS, *(f"-I{path}" for path in searched))
    with ThreadPoolExecutor(cores()) as pool:
        jobs = [
            pool.submit(tools.run, *tools.cxx, *flags, "-c", str(source), "-o", made)
            for source, made in zip(sources, objects, strict=True)
        ]
        on_step(0, len(jobs) + 1)
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            on_step(done, len(jobs) + 1)
    server = scratch / SERVER
    tools.run(*tools.cxx, *objects, "-o", str(server), *_LINK)
    on_step(len(jobs) + 1, len(jobs) + 1)
    return server


def _package(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _digest(tools: toolchain.Toolchain) -> str:
    """A name for what a build is made of."""
    made_of = [tools.name, *tools.cxx[-2:], *_FLAGS, *_LINK, str(_UNITS)]
    made_of += [version("apache-tvm"), version("apache-tvm-ffi")]
    made_of += [file.read_text() for file in sorted(_OURS.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]


def oldest_glibc(server: Path) -> str:
    """The first version of the GNU C library that has everything the server asks of it: '2.34'."""
    asked = {int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", server.read_bytes())}
    return f"2.{max(asked)}"


def emulate(target: Target, server: Path, tracker: str, key: str) -> NoReturn:
    """Become the server, on an emulated CPU of ``target``. Only this machine reaches it.

    Raises:
        ValueError: no emulator, or no C library for it.
    """
    emulator.check_c_library(target)
    command = [*emulator.command(target), str(server), "--host", "127.0.0.1", "--tracker", tracker, "--key", key]
    sys.stdout.flush()
    os.execvp(command[0], command)
