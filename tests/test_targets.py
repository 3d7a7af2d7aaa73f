"""A contract over every target, the choice of one, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module

import pytest

import targets
from targets import Target

NAMES = targets.names()
# What LLVM calls the flags of /proc/cpuinfo that a record may ask for, where it has another name.
X86_FLAGS = {"avx512_vpopcntdq": "avx512vpopcntdq", "avx512_vnni": "avx512vnni", "avx512_bitalg": "avx512bitalg"}
ARM64_FLAGS = {
    "asimd": "neon", "asimddp": "dotprod", "asimdfhm": "fp16fml", "asimdhp": "fullfp16", "asimdrdm": "rdm",
    "atomics": "lse", "fcma": "complxnum", "flagm2": "altnzcv", "fphp": "fullfp16", "frint": "fptoint",
    "ilrcpc": "rcpc-immo", "jscvt": "jsconv", "lrcpc": "rcpc", "uscat": "lse2",
}  # fmt: skip
ARMV7_FLAGS = {"idiva": "hwdiv-arm", "idivt": "hwdiv", "vfpv4": "vfp4"}
LLVM_FLAGS = {"x86_64": X86_FLAGS, "aarch64": ARM64_FLAGS, "armv7l": ARMV7_FLAGS}
# Those of LLVM's features that change which instructions it writes for our kernels.
USED = {
    "x86_64": r"avx\w+|fma|bmi2|popcnt|sse4a|xop|gfni",
    "aarch64": r"neon|sve2?|dotprod|fp16fml|fullfp16|rdm|lse|lse2|complxnum|altnzcv|flagm|fptoint|rcpc|rcpc-immo"
    r"|jsconv|i8mm|bf16",
    "armv7l": r"neon|vfp4|hwdiv|hwdiv-arm|fullfp16|dotprod",
}


def a_target(**changes: object) -> Target:
    return dataclasses.replace(targets.load("x86-avx2"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert bool(target.features) == target.tvm_runtime  # where nothing can ask, nothing is asked for
    if target.tvm_runtime:
        assert target.triple.startswith(target.machine)
        assert re.search("-linux-gnu(eabihf)?$", target.triple)
        assert target.gnu_triple and target.zig_triple
    assert target.gnu_triple or target.zig_triple
    assert target.cflags and all(flag.startswith("-m") for flag in target.cflags)
    assert (target.float_abi == "hard") == target.triple.endswith("eabihf")
    assert target.features == {flag.strip().lower() for flag in target.features}
    assert target.lanes * 32 == target.vector_bits
    assert target.vector_bits in (32, 128, 256, 512)
    assert len(target.popcount) > 3
    assert re.search(r"[A-Z]", target.source)
    module = import_module(f"targets.{name.replace('-', '_')}")
    assert (inspect.getdoc(module) or "").endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_llvm_compiles_for_the_features_that_a_record_names(name: str) -> None:
    """A feature that is not listed would be used but not checked for; one too many would refuse CPUs in vain."""
    from tvm.target.codegen import llvm_get_cpu_features

    target = targets.load(name)
    tvm_target = target.tvm_target(3)
    tvm_target = tvm_target.host if target.gpu else tvm_target
    attrs = dict(tvm_target.attrs.items())
    assert (attrs["mtriple"], attrs["mcpu"], list(attrs.get("mattr", ()))) == (
        target.triple,
        target.cpu,
        list(target.attributes),
    )
    assert attrs["num-cores"] == 3
    assert attrs.get("mfloat-abi", "") == target.float_abi
    if target.tvm_runtime:
        enabled = set(llvm_get_cpu_features(tvm_target))
        named = {LLVM_FLAGS[target.machine].get(flag, flag) for flag in target.features}
        used = {flag for flag in enabled if re.fullmatch(USED[target.machine], flag)}
        assert named <= enabled
        assert named == used


def test_records_differ() -> None:
    records = [targets.load(name) for name in NAMES]
    keys = {(r.triple, r.cpu, r.attributes, r.gpu) for r in records}
    assert len(keys) == len(records)
    cpus = [r for r in records if r.gpu is None]
    hosts = [(r.machine, r.cpu_part or r.features) for r in cpus if r.tvm_runtime]  # what `host` chooses by
    assert len(set(hosts)) == len(hosts)


def test_names_are_the_files_of_the_folder() -> None:
    assert sorted(NAMES) == NAMES
    x86 = {"x86-avx2", "x86-avx512", "x86-avx512bw", "x86-avx512vnni"}
    assert x86 | {"cortex-a53", "cortex-a7", "cortex-m4", "wasm32"} <= set(NAMES)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in NAMES)


def test_host_is_the_richest_target_that_runs_here() -> None:
    host = targets.host()
    assert targets.load("host") == host
    assert host.missing_features() == []
    runnable = [t for t in map(targets.load, NAMES) if not t.missing_features()]
    assert all(len(t.features) <= len(host.features) for t in runnable)


@pytest.mark.parametrize(
    ("machine", "part", "features", "chosen"),
    [
        ("aarch64", "0xd08", "fp asimd crc32", "cortex-a72"),
        ("aarch64", "0xd03", "fp asimd crc32", "cortex-a53"),
        ("aarch64", "0xd0b", "fp asimd asimddp asimdhp asimdrdm atomics fphp lrcpc", "cortex-a76"),
        ("aarch64", "0xd07", "fp asimd crc32", "cortex-a53"),  # an A57: none of ours
        ("armv7l", "0xc07", "half thumb vfp neon vfpv4 idiva idivt", "cortex-a7"),
        ("x86_64", "", "avx2 fma bmi2 popcnt", "x86-avx2"),
    ],
)
def test_host_of_other_machines(
    machine: str, part: str, features: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This core's own target; for a core without one, a target whose instructions it has."""
    cpuinfo = {"CPU part": part, "Features": features}
    monkeypatch.setattr(targets._target.platform, "machine", lambda: machine)
    monkeypatch.setattr(targets._target, "_cpuinfo", lambda: cpuinfo)
    assert targets.host().name == chosen


GPUS = [name for name in NAMES if name.startswith("cuda-")]


@pytest.mark.parametrize("name", GPUS)
def test_gpu_contract(name: str) -> None:
    target = targets.load(name)
    gpu = target.gpu
    assert gpu is not None and name == f"cuda-{gpu.arch.replace('_', '')}"
    assert (gpu.fragment == (0, 0, 0)) == (gpu.bit_product == "")
    assert 48 << 10 < gpu.shared_bytes < 228 << 10
    assert (target.byte_counter, target.byte_popcount, target.shift_insert) == (None, None, None)
    tvm_target = target.tvm_target(1)
    assert (tvm_target.kind.name, tvm_target.host.kind.name) == ("cuda", "llvm")
    assert (tvm_target.attrs["arch"], int(tvm_target.attrs["max_shared_memory_per_block"])) == (
        gpu.arch,
        gpu.shared_bytes,
    )


@pytest.mark.parametrize(
    ("found", "runs"),
    [
        (None, set()),
        ((7, 0), set()),
        ((8, 0), {"cuda-sm80"}),
        ((8, 9), {"cuda-sm80", "cuda-sm86", "cuda-sm87", "cuda-sm89"}),
        ((9, 0), {"cuda-sm90"}),
        ((10, 3), {"cuda-sm100"}),
    ],
)
def test_code_runs_on_its_major_number_and_no_lower_minor_one(
    found: tuple[int, int] | None, runs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets._gpu, "capability", lambda: found)
    gpus = {name: targets.load(name).gpu for name in GPUS}
    assert {name for name, gpu in gpus.items() if gpu and not gpu.missing()} == runs
    assert targets.host().gpu is None
    if found is None:
        assert gpus["cuda-sm86"] and gpus["cuda-sm86"].missing() == "an NVIDIA GPU of compute capability 8.6 to 8.9"


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import targets._target as module

    target = targets.load("x86-avx512bw")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module, "cpu_features", lambda: target.features - {"fma", "avx512vl"} | {"sse"})
    assert target.missing_features() == ["avx512vl", "fma"]
    monkeypatch.setattr(module, "cpu_features", lambda: target.features | {"sse"})
    assert target.missing_features() == []
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    assert target.missing_features() == ["a x86_64 CPU"]
    assert targets.load("cortex-a72").missing_features() == ["an aarch64 CPU"]


def test_a_cpu_without_any_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets._target, "cpu_features", frozenset)
    with pytest.raises(ValueError, match=r"no target runs on this CPU: the package has .*x86-avx2.* --target"):
        targets.load("host")


@pytest.mark.parametrize(
    ("wrong", "near"), [("x86-avx", "x86-avx2"), ("avx512", "x86-avx512"), ("hots", "host"), ("x86_avx2", "x86-avx2")]
)
def test_an_unknown_name_gives_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no target '{wrong}': did you mean .*\b{near}\b.* `crossbit targ"):
        targets.load(wrong)


@pytest.mark.parametrize("wrong", ["", "zzzzzzz", "_target", "__init__"])
def test_a_name_near_to_none_gives_a_sentence_with_names(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"there is no target .*(x86-avx2|host)"):
        targets.load(wrong)


def test_a_cpu_that_llvm_does_not_know_is_refused() -> None:
    with pytest.raises(
        ValueError, match="target x86-avx2: LLVM does not know the CPU 'x86-64-v9' for x86_64-linux-gnu"
    ):
        a_target(cpu="x86-64-v9").tvm_target(1)


@pytest.mark.parametrize("attribute", ["+avx3", "-avx3", "+neon"])
def test_an_attribute_that_llvm_does_not_know_is_refused(attribute: str) -> None:
    sentence = f"target x86-avx2: LLVM does not know the attribute '{attribute}' for x86_64-linux-gnu"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        a_target(attributes=("-prefer-256-bit", attribute)).tvm_target(1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vector_bits": 100}, "vector_bits = 100 does not hold whole 32-bit words"),
        ({"vector_bits": 0}, "vector_bits = 0 does not hold whole 32-bit words"),
        ({"vector_bits": 16}, "vector_bits = 16 does not hold whole 32-bit words"),
        ({"registers": 12}, "registers = 12; a register file has 8, 16 or 32"),
        ({"attributes": ("avx2",)}, "every attribute starts with + or -"),
        ({"attributes": ("+avx2", "fma")}, "every attribute starts with + or -"),
    ],
)
def test_a_bad_record_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"target x86-avx2: {sentence}")):
        a_target(**change)


def test_facts_about_this_machine() -> None:
    assert targets.cores() >= 1
    assert targets.cpu_name()
    assert all(re.fullmatch(r"\S+", flag) for flag in targets.cpu_features())
