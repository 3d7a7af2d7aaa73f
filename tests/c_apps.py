"""Apps around C libraries: tests/harness.c with what `packaging.compile_network` wrote, run here or emulated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import machines
import numpy as np

import targets
from pipeline import artifact, toolchain
from pipeline.artifact import Emit
from pipeline.packaging import compile_network, oracle
from targets import Target

EMITS: tuple[Emit, ...] = ("c-lib", "c-source")


@dataclass(frozen=True)
class App:
    """An executable around the library of ``folder``."""

    folder: Path
    program: Path
    target: Target

    def run(
        self, inputs: Sequence[dict[str, np.ndarray]], *, workers: int = 0, shift: int = 0, repeats: int = 2
    ) -> list[dict[str, np.ndarray]]:
        """The outputs of as many threads as there are ``inputs``; see harness.c."""
        manifest = artifact.read(self.folder)
        arrays = [one[spec.name] for one in inputs for spec in manifest.inputs]
        given, made = self.program.with_suffix(".in"), self.program.with_suffix(".out")
        given.write_bytes(b"".join(array.astype(np.float32).tobytes() for array in arrays))
        options = map(str, (shift, workers, len(inputs), repeats))
        done = machines.run(self.target, self.program, str(given), str(made), *options)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
        self.pool_calls.append(int(done.stdout))
        values, outputs = np.fromfile(made, np.float32), []
        for _ in inputs:
            one = {}
            for spec in manifest.outputs:
                size = int(np.prod(spec.shape))
                one[spec.name], values = values[:size].reshape(spec.shape), values[size:]
            outputs.append(one)
        assert values.size == 0
        return outputs

    @property
    def pool_calls(self) -> list[int]:
        """How often each run so far lent its pool."""
        return _POOL_CALLS.setdefault(self.program, [])


_POOL_CALLS: dict[Path, list[int]] = {}


def compiled(
    model: Path, folder: Path, emit: Emit, target: str = "host", threads: int = 1, batch: int = 1, name: str = "net"
) -> Path:
    """The artifact of a model, in a new folder of ``folder``."""
    into = folder / f"{emit}-{target}-{threads}-{name}"
    compile_network(model, into, targets.load(target), threads, batch, emit=emit, name=name)
    return into


STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")


def build(
    folder: Path,
    library: Sequence[str] = STRICT,
    *,
    both: Sequence[str] = ("-O1",),
    cc: Sequence[str] = (),
    link: Sequence[str] = ("-static",),
    name: str = "app",
) -> App:
    """The harness around an artifact: with its C source, its archive or, if it is not linked statically, its .so.

    Args:
        library: flags for the C source. both: for the source, the harness and the linker.
        cc: the compiler; default: the target's, for its CPU.
    """
    manifest = artifact.read(folder)
    assert manifest.c_library is not None
    called, target = manifest.c_library.name, targets.load(manifest.target)
    scratch = folder.parent / f"{folder.name}-{name}"
    scratch.mkdir(exist_ok=True)
    (scratch / "app.h").write_text(_app_header(folder))
    tools, program = toolchain.find(target), scratch / "program"
    compiler = (*(cc or tools.cc), *both, f"-I{folder}")
    harness = Path(__file__).with_name("harness.c")
    tools.run(*compiler, "-std=gnu11", f"-I{scratch}", "-c", str(harness), "-o", f"{scratch}/harness.o")
    part = folder / (f"lib{called}.a" if "-static" in link else f"lib{called}.so")
    if manifest.emit == "c-source":
        part = scratch / "library.o"
        tools.run(*compiler, *library, "-c", str(folder / f"{called}.c"), "-o", str(part))
    linker = (f"-Wl,-rpath,{folder}", *link, "-pthread", "-lm")
    tools.run(*compiler, f"{scratch}/harness.o", str(part), "-o", str(program), *linker)
    return App(folder, program, target)


def ids(folder: Path) -> tuple[list[str], list[str]]:
    """The C names of the inputs and outputs, as the header's macros have them."""
    manifest = artifact.read(folder)
    assert manifest.c_library is not None
    header = (folder / f"{manifest.c_library.name}.h").read_text()
    found = re.findall(rf"#define {manifest.c_library.name.upper()}_(\w+)_ELEMENTS ", header)
    inputs = len(manifest.inputs)
    assert len(found) == inputs + len(manifest.outputs)
    return found[:inputs], found[inputs:]


def _app_header(folder: Path) -> str:
    manifest = artifact.read(folder)
    assert manifest.c_library is not None
    name = manifest.c_library.name
    prefix, (inputs, outputs) = name.upper(), ids(folder)
    given = ", ".join([*(f"(i)[{n}]" for n in range(len(inputs))), *(f"(o)[{n}]" for n in range(len(outputs)))])

    def sizes(role: str, names: list[str]) -> str:
        values = ", ".join(f"{prefix}_{each}_ELEMENTS" for each in names)
        return f"static const size_t {role}_elements[] = {{{values}}};\n"

    return (
        f'#include "{name}.h"\n'
        f"#define MODEL {name}_model\n"
        f"#define MODEL_STRERROR {name}_strerror\n"
        f"#define INPUTS {len(inputs)}\n"
        f"#define OUTPUTS {len(outputs)}\n"
        f"#define WORKSPACE_BYTES {prefix}_WORKSPACE_BYTES\n"
        f"#define RUN(i, o, memory, pool) "
        f"{name}_run_with({prefix}_INTERFACE, {given}, memory, {prefix}_WORKSPACE_BYTES, pool)\n"
        + sizes("input", inputs)
        + sizes("output", outputs)
    )


def by_runtime(model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs by name."""
    session = oracle(model)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs), strict=True))
