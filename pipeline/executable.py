"""Kernels as an executable of their target, to be run where neither TVM nor Python is: on an emulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import kernel, llvm, toolchain
from pipeline.kernel import Part
from targets import Target

_MAIN = """
#include <stdio.h>
#include <stdlib.h>
{declarations}
int main(int count, char **paths) {{
  unsigned char *memory;
  if (count != 2 || posix_memalign((void **)&memory, 64, {size})) return 2;
  FILE *file = fopen(paths[1], "r+b");
  if (!file || fread(memory, 1, {size}, file) != {size}) return 2;
{calls}
  rewind(file);
  return fwrite(memory, 1, {size}, file) != {size} || fclose(file);
}}
"""


def link(
    parts: Sequence[Part], calls: Sequence[tuple[str, Sequence[int]]], size: int, target: Target, folder: Path
) -> Path:
    """Link ``folder/program``, statically: ``program FILE`` reads its memory from FILE, makes the calls, writes back.

    Args:
        parts: the functions, none of which has a parallel loop.
        calls: a part's symbol, and for each of its pointers the bytes from the start of the memory.
        size: of the memory, in bytes. /dev/zero is a file of any size.

    Raises:
        ValueError: the target has no C compiler here, or it failed.
    """
    llvm.build(kernel.module(parts), target.tvm_target(1)).write_to_file(str(folder / "kernels.o"))
    values = {
        "declarations": "\n".join(
            f"int {part.symbol}({', '.join(['void *'] * len(part.function.params))});" for part in parts
        ),
        "calls": "\n".join(
            f"  {name}({', '.join(f'memory + {place}' for place in places)});" for name, places in calls
        ),
        "size": size,
    }
    (folder / "main.c").write_text(_MAIN.format(**values))
    tools = toolchain.find(target)
    sources = (f"{folder}/main.c", f"{folder}/kernels.o")
    tools.run(*tools.cc, "-std=gnu11", "-static", "-o", f"{folder}/program", *sources, "-lm")
    return folder / "program"
