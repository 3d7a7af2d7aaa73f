"""Which compiler is found for a target, what it makes, and that the emulated cores run it and nothing more."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import struct
import sys
from pathlib import Path

import machines
import pytest

import targets
from pipeline import artifact, emulator, toolchain
from pipeline.packaging import compile_network
from pipeline.toolchain import Linker, Toolchain

ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "armv7l": 40, "arm-none": 40}
HAS_ZIG = importlib.util.find_spec("ziglang") is not None


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, on an x86-64 machine without zig."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    return folder


def tool(folder: Path, name: str, script: str = "echo 9.8.7") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which only zig is left."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))


# What is found -----------------------------------------------------------------------------------------------------


def test_the_machines_own_compiler_comes_first(tools: Path) -> None:
    avx2 = targets.load("x86-avx2")
    tool(tools, "x86_64-linux-gnu-gcc")
    assert toolchain.find(avx2).cc == ("x86_64-linux-gnu-gcc", "-march=x86-64-v3")
    tool(tools, "clang")
    assert toolchain.find(avx2).cc == ("clang", "-march=x86-64-v3")
    tool(tools, "gcc")
    assert toolchain.find(avx2) == Toolchain("gcc 9.8.7", ("gcc", "-march=x86-64-v3"), ("ar",))


def test_a_cross_compiler_is_named_by_the_target(tools: Path) -> None:
    for name in ("gcc", "clang", "aarch64-linux-gnu-gcc", "arm-linux-gnueabihf-gcc", "arm-none-eabi-gcc"):
        tool(tools, name)
    found = toolchain.find(targets.load("cortex-a72"))
    assert found.name == "aarch64-linux-gnu-gcc 9.8.7"
    assert (found.cc, found.ar) == (("aarch64-linux-gnu-gcc", "-mcpu=cortex-a72"), ("aarch64-linux-gnu-ar",))
    assert toolchain.find(targets.load("cortex-a7")).cc[0] == "arm-linux-gnueabihf-gcc"
    assert toolchain.find(targets.load("cortex-m55")).cc[:2] == ("arm-none-eabi-gcc", "-mcpu=cortex-m55")


def test_on_a_board_its_own_compiler_is_used(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for name in ("gcc", "aarch64-linux-gnu-gcc"):
        tool(tools, name)
    assert toolchain.find(targets.load("cortex-a53")).cc == ("gcc", "-mcpu=cortex-a53")


@pytest.mark.skipif(not HAS_ZIG, reason="ziglang is not installed")
@pytest.mark.parametrize(
    ("name", "triple", "cpu"),
    [
        ("cortex-a72", "aarch64-linux-gnu", "cortex_a72"),
        ("cortex-a710", "aarch64-linux-gnu", "cortex_a710-sve"),
        ("cortex-a7", "arm-linux-gnueabihf", "cortex_a7"),
        ("wasm32", "wasm32-wasi", "generic+simd128"),
        ("x86-avx512bw", "x86_64-linux-gnu", "skylake_avx512-prefer_256_bit"),
    ],
)
def test_zig_is_the_last(name: str, triple: str, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compilers(monkeypatch)
    found = toolchain.find(targets.load(name))
    assert found.name.startswith("zig 0.")
    assert found.cc == (sys.executable, "-m", "ziglang", "cc", "-target", triple, f"-mcpu={cpu}")
    assert found.ar == (sys.executable, "-m", "ziglang", "ar")


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("x86-avx2", "`apt-get install gcc libc6-dev` or `pip install ziglang`"),
        ("cortex-a72", "`apt-get install gcc-aarch64-linux-gnu` or `pip install ziglang`"),
        ("cortex-a7", "`apt-get install gcc-arm-linux-gnueabihf` or `pip install ziglang`"),
        ("cortex-m4", "`apt-get install gcc-arm-none-eabi`"),
        ("wasm32", "`pip install ziglang`"),
    ],
)
def test_without_any_it_says_what_to_install(name: str, ways: str, tools: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole sentence is compared
        toolchain.find(targets.load(name))
    assert str(caught.value) == f"no C compiler for target {name} on this machine: run {ways}"


def test_a_linker_alone_is_the_last_for_tvms_libraries(tools: Path) -> None:
    target = targets.load("cortex-a72")
    ways = "`apt-get install binutils-aarch64-linux-gnu` or `pip install ziglang`"
    with pytest.raises(ValueError, match=f"^no linker for target cortex-a72 on this machine: run {ways}$"):
        toolchain.find_linker(target)
    tool(tools, "aarch64-linux-gnu-ld")
    tool(tools, "aarch64-linux-gnu-nm", 'echo "TVMFFISomething U"; echo "memcpy@GLIBC_2.17 U"; echo "__gmon_start__ w"')
    linker = toolchain.find_linker(target)
    assert linker == Linker("aarch64-linux-gnu")
    linker.link_shared("x.so", ["x.o"])
    tool(tools, "aarch64-linux-gnu-nm", 'echo "expf U"; echo "TVMFFISomething U"')
    with pytest.raises(
        ValueError, match="aarch64-linux-gnu-ld alone has no C library, and the code calls expf: run `ap"
    ):
        linker.link_shared("x.so", ["x.o"])
    tool(tools, "aarch64-linux-gnu-gcc")
    assert toolchain.find_linker(target) == toolchain.find(target)


def test_a_cxx_compiler_may_be_missing_beside_the_c_compiler(tools: Path) -> None:
    target = targets.load("cortex-a7")
    tool(tools, "arm-linux-gnueabihf-gcc")
    ways = "`apt-get install g\\+\\+-arm-linux-gnueabihf` or `pip install ziglang`"
    with pytest.raises(ValueError, match=f"^no C\\+\\+ compiler for target cortex-a7 on this machine: run {ways}$"):
        toolchain.find_cxx(target)
    tool(tools, "arm-linux-gnueabihf-g++")
    assert toolchain.find_cxx(target).cxx == ("arm-linux-gnueabihf-g++",)


def test_a_failing_tool_is_quoted_in_one_sentence(tools: Path) -> None:
    tool(tools, "gcc", 'echo "x.c:1: Note"; for i in 1 2 3 4; do echo "  x.c:$i: error: no $i" >&2; done; exit 3')
    found = Toolchain("gcc 9.8.7", ("gcc",), ("ar",))
    with pytest.raises(ValueError, match=r"^gcc 9\.8\.7 failed \(3\): x\.c:1: error: no 1; .* no 2; .* no 3$"):
        found.run(*found.cc, "x.c")
    tool(tools, "gcc", "exit 4")
    with pytest.raises(ValueError, match=r"^gcc 9\.8\.7 failed \(4\): it says nothing$"):
        found.run("gcc")


# What they make ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", targets.names())
def test_what_every_target_compiles(name: str, tmp_path: Path) -> None:
    """An object, an archive and (where there is an operating system) a shared library for the target's machine."""
    target = targets.load(name)
    try:
        found = toolchain.find(target)
    except ValueError as error:
        pytest.skip(str(error))
    source, object_, archive = tmp_path / "x.c", tmp_path / "x.o", tmp_path / "libx.a"
    source.write_text("float f(float a, float b) { return a * b + 1; }\n")
    found.run(*found.cc, "-std=c99", "-O3", "-fPIC", "-c", str(source), "-o", str(object_))
    found.run(*found.ar, "rcs", str(archive), str(object_))
    assert archive.read_bytes().startswith(b"!<arch>\n")
    built = [object_]
    if target.tvm_runtime:
        library = tmp_path / "x.so"
        found.link_shared(str(library), [str(object_)])
        built.append(library)
    for file in built:
        header = file.read_bytes()[:20]
        if target.machine == "wasm32":
            assert header.startswith(b"\0asm")
        else:
            assert struct.unpack("<H", header[18:20]) == (ELF_MACHINES[target.machine],)
    source.write_text("int f(void) { return nothing; }\n")
    with pytest.raises(ValueError, match=f"{found.name}.* failed .*nothing"):
        found.run(*found.cc, "-c", str(source), "-o", str(object_))


@pytest.mark.parametrize(
    "by", ["gcc", "ld", pytest.param("zig", marks=pytest.mark.slow)]
)  # zig first makes the C library
@pytest.mark.parametrize("name", ["cortex-a72", "cortex-a7"])
def test_an_artifact_of_another_machine(
    name: str, by: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = targets.load(name)
    if by == "zig":
        without_compilers(monkeypatch)
    elif by == "ld":
        monkeypatch.setattr(toolchain, "_installed", lambda _: iter(()))
    if by != "zig" and shutil.which(f"{target.gnu_triple}-{by}") is None:
        pytest.skip(f"{target.gnu_triple}-{by} is missing")
    if by == "zig" and not HAS_ZIG:
        pytest.skip("ziglang is not installed")
    made = compile_network(small_model, tmp_path / "made", target, 1)
    assert (made.target, made.machine, set(made.features)) == (name, target.machine, target.features)
    assert artifact.read(tmp_path / "made") == made  # which compares the library's ELF header


def test_a_target_without_tvms_runtime_takes_no_artifact(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target cortex-m4 has neither TVM's runtime nor shared libraries"):
        compile_network(small_model, tmp_path / "made", targets.load("cortex-m4"), 1)
    assert not list(tmp_path.iterdir())


# Emulated cores ----------------------------------------------------------------------------------------------------


def build(target: targets.Target, folder: Path, text: str, *flags: str) -> Path:
    machines.need(target)
    found = toolchain.find(target)
    source, program = folder / "program.c", folder / "program"
    source.write_text(text)
    found.run(*found.cc, "-O2", *flags, str(source), "-o", str(program))
    return program


HELLO = """
#include <stdio.h>
#include <stdlib.h>
int main(int count, char **arguments) {
  unsigned ones = 0;
  for (int i = 1; i < count; i++) ones += __builtin_popcount(strtoul(arguments[i], 0, 16));
  printf("%d bytes a pointer, %u ones\\n", (int)sizeof(void *), ones);
  return 7;
}
"""


@pytest.mark.parametrize("linked", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a7", targets.host().name])
def test_a_c_program_runs(name: str, linked: str, tmp_path: Path) -> None:
    target = targets.load(name)
    program = build(target, tmp_path, HELLO, *(["-static"] if linked == "static" else []))
    done = machines.run(target, program, "ff00ff", "1")
    pointer = 4 if target.machine == "armv7l" else 8
    assert (done.returncode, done.stdout) == (7, f"{pointer} bytes a pointer, 17 ones\n"), done.stderr


DOT = """
#include <stdint.h>
#include <stdio.h>
int main(void) {
  uint8_t a[16], b[16];
  uint32_t sums[4] = {0};
  for (int i = 0; i < 16; i++) a[i] = i, b[i] = 255 - i;
  puts("before");
  fflush(stdout);
  __asm__ volatile("ld1 {v0.16b}, [%0]\\n ld1 {v1.16b}, [%1]\\n movi v2.4s, #0\\n udot v2.4s, v0.16b, v1.16b\\n"
                   "st1 {v2.4s}, [%2]" :: "r"(a), "r"(b), "r"(sums) : "v0", "v1", "v2", "memory");
  printf("%u %u %u %u\\n", sums[0], sums[1], sums[2], sums[3]);
  return 0;
}
"""


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a55", "cortex-a76", "cortex-a710"])
def test_a_core_without_dot_products_refuses_them(name: str, tmp_path: Path) -> None:
    """The same program: sums where /proc/cpuinfo says asimddp, an illegal instruction where it does not."""
    target = targets.load(name)
    program = build(target, tmp_path, DOT, "-mcpu=cortex-a76")
    done = machines.run(target, program)
    sums = [sum(i * (255 - i) for i in range(4 * lane, 4 * lane + 4)) for lane in range(4)]
    assert done.stdout.splitlines()[0] == "before"
    if "asimddp" in target.features:
        assert (done.returncode, done.stdout.split()[1:]) == (0, [str(s) for s in sums])
    else:
        assert (done.returncode, done.stdout.split()[1:]) == (-signal.SIGILL, [])


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    target = targets.host()
    program = build(target, tmp_path, "int main(void) { for (volatile int i = 0;; i++) {} }\n")
    with pytest.raises(machines.subprocess.TimeoutExpired):
        machines.run(target, program, seconds=0.2)


def test_a_missing_emulator_skips_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.load("cortex-a53")
    machines.need(target)
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None if name.startswith("qemu") else "/bin/" + name)
    with pytest.raises(pytest.skip.Exception, match="qemu-aarch64 is missing"):
        machines.need(target)
