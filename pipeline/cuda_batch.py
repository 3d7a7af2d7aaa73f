"""Candidates for a GPU's kernels as a folder, which one script times, here or where the folder was carried to.

manifest.json, *.cubin      kernels, their candidates, and machine code by the digest of what it was made of
run.py, results.jsonl       `pipeline/cuda_runner.py`, and what it measured

A candidate is known by its digest alone, so what was built or measured once is not built or measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import compiler, cuda_kernel, cuda_runner, cuda_toolchain
from pipeline.cuda_runner import MANIFEST
from targets import Target, cores

SCRIPT = "run.py"


class Batch:
    """A folder of candidates, made if there is none.

    Raises:
        ValueError: something else is in the folder, or another target's candidates; there is no nvcc for the target.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        self.nvcc = cuda_toolchain.find(target)
        self.kernels: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).is_file():
            if (found := json.loads((folder / MANIFEST).read_text())["target"]) != target.name:
                raise ValueError(f"{folder}: its candidates are for {found}, not {target.name}; name another folder")
        elif any(folder.iterdir()):
            raise ValueError(f"{folder}: not empty, and no candidates of `crossbit tune`; name another folder")
        else:
            self._write_manifest()  # so that what an interrupted build leaves is recognised

    @property
    def waiting(self) -> int:
        """How many candidates have no result."""
        known = self.results()
        return sum(one["digest"] not in known for kernel in self.kernels for one in kernel["candidates"])

    def results(self) -> dict[str, dict[str, Any]]:
        """By digest, {"seconds": [...]} or {"error": "..."}."""
        return cuda_runner.results(self.folder)

    def add(
        self, name: str, default: Any, functions: Sequence[Any], on_built: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Build those candidates of a kernel that have no result; they are in the batch after the next `write`.

        Args:
            default: a scheduled function that the others must equal.
            functions: scheduled functions.

        Returns:
            The digest of each function.
        """
        known, made = self.results(), [self._made(function) for function in functions]
        new = {one["digest"]: (one, source) for one, source in made if one["digest"] not in known}
        if new:
            first = self._made(default)
            self._build(*first)
            pool = ThreadPoolExecutor(cores())
            try:
                builds = {digest: pool.submit(self._build, *each) for digest, each in new.items()}
                built = [new[digest][0] for digest, build in builds.items() if self._is_built(digest, build, on_built)]
            finally:
                pool.shutdown(cancel_futures=True)
            tensors = [(str(p.ty.dtype), [int(n) for n in p.ty.shape]) for p in default.params]
            self.kernels.append({"name": name, "tensors": tensors, "default": first[0], "candidates": built})
        return [one["digest"] for one, _ in made]

    def write(self) -> None:
        """Make the folder hold what was added and nothing else, but for results."""
        self._write_manifest()
        shutil.copy(cuda_runner.__file__, self.folder / SCRIPT)
        used = {one["digest"] for kernel in self.kernels for one in (kernel["default"], *kernel["candidates"])}
        for file in self.folder.glob("*.cubin"):
            if file.stem not in used:
                file.unlink()

    def run(self, on_measured: Callable[[], None]) -> None:
        """Measure on this machine's GPU.

        Raises:
            ValueError: the script could not, for a reason that it gives.
        """
        command = [sys.executable, str(self.folder / SCRIPT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for _ in process.stdout:
                on_measured()
            said = process.stderr.read().strip()
        if process.returncode:
            raise ValueError(f"the GPU measured nothing more: {said.splitlines()[-1] if said else process.returncode}")

    def _write_manifest(self) -> None:
        assert self.target.gpu is not None
        manifest = {"target": self.target.name, "arch": self.target.gpu.arch, "kernels": self.kernels}
        (self.folder / MANIFEST).write_text(json.dumps(manifest) + "\n")

    def _made(self, function: Any) -> tuple[dict[str, Any], str]:
        """A candidate as the manifest has it, and its CUDA C++."""
        finished = compiler.finish(function, self.target)
        source, kernels = cuda_kernel.make({"main": finished}, self.target.tvm_target(1))
        (launch,) = kernels["main"].launches
        what = json.dumps([self.nvcc.name, self.target.name, dataclasses.asdict(launch), source])
        digest = hashlib.sha256(what.encode()).hexdigest()
        return {"digest": digest, "launch": dataclasses.asdict(launch)}, source

    def _build(self, candidate: dict[str, Any], source: str) -> None:
        assert self.target.gpu is not None
        output = self.folder / f"{candidate['digest']}.cubin"
        if not output.exists():
            self.nvcc.compile_kernels(source, output, self.target.gpu.arch)

    def _is_built(self, digest: str, build: Future[None], on_built: Callable[[], None]) -> bool:
        """Wait for a build; one that failed is a result."""
        try:
            build.result()
        except ValueError as error:
            cuda_runner.store(self.folder, digest, error=str(error))
        on_built()
        return build.exception() is None
