"""A compiled network as one folder: library, manifest, golden pair, the records it was built with.

    model.so         the library for TVM's runtime (Relax VM), or
    <name>.h ...     a C library or C source without a runtime, see `c_library`
    manifest.json    what it is, for whom, and the hash of every other file
    golden.npz       an input and the output of the ONNX file for it
    records/         the tuning records used, if any

The folder appears whole or not at all. A board reads it with pydantic and NumPy alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA: Literal[4] = 4
LIBRARY, MANIFEST, GOLDEN, RECORDS = "model.so", "manifest.json", "golden.npz", "records"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "armv7l": 40}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Record):
    """An input or output. Layout is the order of ``shape``: NCHW or NC, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32"]
    layout: str


class Layer(_Record):
    """One Conv, Gemm or MatMul of the ONNX file.

    Attributes:
        method: '1w1a' (bits of weights and activations, 32: real), with '/M' where M filters share a scale; or 'float'.
        bits_per_weight: of what is stored, scales included.
        stored_bytes: the weights as stored. float_bytes: the same weights in float32.
        binary_macs, float_macs: multiply-accumulates of codes and of floats for one example; one a residual plane.
        why_float: a sentence, for float layers.
    """

    name: str
    operator: str
    method: str
    bits_per_weight: float
    stored_bytes: int
    float_bytes: int
    binary_macs: int
    float_macs: int
    why_float: str


Kind = Literal["binary", "float", "integer", ""]


class Call(_Record):
    """What one call of a kernel has to do, whatever its schedule.

    Attributes:
        kind: of the multiply-accumulates, see `pipeline.work.products`; '' where there are none.
        bytes: of inputs, weights and outputs, each once.
    """

    kernel: str
    kind: Kind
    macs: int
    bytes: int


class File(_Record):
    sha256: str
    bytes: int


class CLibrary(_Record):
    """What is particular to a library without a runtime.

    Attributes:
        name: of the library, its header and all its symbols.
        workspace_bytes: what a caller lends.
        workspace_bound: bytes below which no plan for its order of kernels can go.
        constant_bytes: weights as packed, thresholds, scales.
        toolchain: the compiler of its driver; '' for C source.
    """

    name: str
    workspace_bytes: int
    workspace_bound: int
    constant_bytes: int
    toolchain: str


Emit = Literal["vm", "c-lib", "c-source"]


class Manifest(_Record):
    """Everything a reader of an artifact needs to know. Sizes in bytes, dates in ISO 8601 (UTC).

    calls: of kernels, in the order of execution.
    gpus: what its kernels are compiled for, ('sm_80', ...); empty where they run on the CPU.
    """

    schema_version: Literal[4]
    name: str
    emit: Emit
    c_library: CLibrary | None
    model_sha256: str
    target: str
    machine: str
    features: tuple[str, ...]
    gpus: tuple[str, ...]
    threads: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    calls: tuple[Call, ...]
    kernels: int
    tuned_kernels: int
    tolerance: float
    files: dict[str, File]
    versions: dict[str, str]
    created: str

    @property
    def library(self) -> str:
        """The file that runs, or is compiled to what runs."""
        if self.c_library is None:
            return LIBRARY
        return f"lib{self.c_library.name}.so" if self.emit == "c-lib" else f"{self.c_library.name}.c"


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path, manifest: Manifest, content: Path) -> None:
    """Put the files of ``content`` and their manifest at ``folder``, replacing an artifact that is there.

    ``content`` must be on the same file system; it is gone afterwards.

    Raises:
        ValueError: ``folder`` exists and is something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: exists and is no artifact; give another folder, or remove it")
    files = {
        str(path.relative_to(content)): File(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(content.rglob("*"))
        if path.is_file()
    }
    complete = manifest.model_copy(update={"files": files})
    (content / MANIFEST).write_text(complete.model_dump_json(indent=2) + "\n")
    if not folder.exists():
        os.rename(content, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old / "artifact")
    try:
        os.rename(content, folder)
    except OSError:
        os.rename(old / "artifact", folder)
        raise
    finally:
        shutil.rmtree(old)


def read(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all there and unchanged.

    Raises:
        ValueError: no artifact, another schema, a missing, truncated or changed file, a library of another machine.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: not an artifact (it has no {MANIFEST}); `crossbit compile` makes one")
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {where}: {first['msg']}; compile again with this crossbit") from error
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; compile again")
        if file.stat().st_size != expected.bytes:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected.bytes}; compile again")
        if sha256(file) != expected.sha256:
            raise ValueError(f"{file}: changed since it was compiled (SHA-256 differs); compile again")
    for required in (manifest.library, GOLDEN):
        if required not in manifest.files:
            raise ValueError(f"{path}: lists no {required}; compile again")
    library = folder / manifest.library
    if manifest.emit != "c-source" and (machine := _elf_machine(library)) != manifest.machine:
        raise ValueError(f"{library}: built for {machine}, the manifest says {manifest.machine}; compile again")
    return manifest


def golden(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The golden inputs and outputs by name."""
    with np.load(folder / GOLDEN, allow_pickle=False) as arrays:
        pairs = {kind: {k.split(":", 1)[1]: arrays[k] for k in arrays if k.startswith(kind)} for kind in ("in", "out")}
    return pairs["in"], pairs["out"]


def save_golden(path: Path, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """Write a golden pair."""
    arrays = {f"in:{k}": v for k, v in inputs.items()} | {f"out:{k}": v for k, v in outputs.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _elf_machine(library: Path) -> str:
    header = library.open("rb").read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return "no ELF machine"
    (code,) = struct.unpack("<H", header[18:20])
    return next((name for name, value in _ELF_MACHINES.items() if value == code), f"ELF machine {code}")
