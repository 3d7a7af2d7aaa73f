"""Networks and kernels on an NVIDIA GPU: checked first, then timed in turns with torch, by the GPU's own events.

    python scripts/bench_cuda.py [--json FILE]                      # on a machine with a GPU, nvcc and crossbit
    python scripts/bench_cuda.py --build DIR [--target cuda-sm90]   # here, without a GPU: everything that is compiled
    python scripts/bench_cuda.py --run DIR [--json FILE]            # there: needs the driver and NumPy, and no TVM

Subjects: the four 3x3 convolutions of ResNet-18 (bits in; sums or bits out) and a product of 8192 x 8192 x 8192 bits,
the digits' network, ResNet-18 (M = 16, 224x224) and VGG-7 (32x32), at batch 1 and larger. They are launched one by one
and, as an app would at batch 1, as a CUDA graph. Beside them, where torch is there with CUDA: cuDNN in half precision,
channels last, networks also as graphs, and int8 matrix products of the same size, without what would make them
convolutions. The peak is a register loop of the 1-bit instruction. Images of a batch repeat what the check covers.
"""

from __future__ import annotations

import argparse  # typer may be absent where this runs
import ctypes
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.cuda_runner import Driver  # which needs no more than this script does

CONVS = {"56x56x64": (56, 64), "28x28x128": (28, 128), "14x14x256": (14, 256), "7x7x512": (7, 512)}
BATCHES = {"conv": (1, 128), "gemm": (8192,), "digits": (1,), "resnet18": (1, 512), "vgg7": (1, 512)}
NETWORKS: dict[str, tuple[str, tuple[int, ...], int, dict[str, Any]]] = {
    "digits": ("vgg_small", (1, 8, 8), 10, {"widths": (32, 64, 64)}),
    "resnet18": ("resnet18", (3, 224, 224), 1000, {"stem": "imagenet"}),
    "vgg7": ("vgg7", (3, 32, 32), 10, {}),
}
DISTINCT = 4  # images of a batch of a convolution, and rows of a product, that differ
SIDE = 8192
TOLERANCE = 1e-4  # of the largest output of a network, as `crossbit verify` has it

PEAK = r"""
#include <cstdint>
#include <cuda_runtime.h>
constexpr int CHAINS = 8;
__global__ void loop(uint32_t *out, int rounds) {
  uint32_t a[4], b[2], sums[CHAINS][4] = {};
  for (int i = 0; i < 4; i++) a[i] = threadIdx.x * 2654435761u + i;
  for (int i = 0; i < 2; i++) b[i] = threadIdx.x * 40503u + i;
  for (int r = 0; r < rounds; r++)
#pragma unroll
    for (int c = 0; c < CHAINS; c++)
      asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                   "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+r"(sums[c][0]), "+r"(sums[c][1]), "+r"(sums[c][2]), "+r"(sums[c][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  uint32_t total = 0;
  for (int c = 0; c < CHAINS; c++) for (int i = 0; i < 4; i++) total += sums[c][i];
  if (total == 12345) out[threadIdx.x] = total;
}
extern "C" __attribute__((visibility("default")))
int crossbit_peak(uint32_t *out, int blocks, int rounds, void *stream) {
  loop<<<blocks, 256, 0, (cudaStream_t)stream>>>(out, rounds);
  return (int)cudaGetLastError();
}
"""
PEAK_OPERATIONS = 2 * 16 * 8 * 256 * 8 * (256 // 32)  # of a block and a round; a multiply-accumulate is two


# Building, without a GPU ---------------------------------------------------------------------------------------------


def build(folder: Path, target_name: str, only: str) -> None:
    """Compile every subject to a folder: <subject>.so, <subject>.npz, and bench.json, which describes them."""
    import targets
    from pipeline import cuda_toolchain

    target = targets.load(target_name)
    if target.gpu is None:
        raise ValueError(f"target {target_name} is no GPU: choose one of `crossbit targets` that begins with cuda-")
    nvcc = cuda_toolchain.find(target)
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for name, batch, operations, lowered, inputs, expected in _subjects(target, only):
        print(f"building {name}", flush=True)
        described.append(_build(folder, name, target, nvcc, lowered, inputs, expected))
        described[-1] |= {"batch": batch, "operations": operations}
    if target.gpu.bit_product == "and" and not only:
        _link(folder / "peak.so", PEAK, (target.gpu.arch,), nvcc)
    facts = {"target": target.name, "gpu": target.gpu.arch, "nvcc": nvcc.name, "subjects": described}
    (folder / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")


def _subjects(target: Any, only: str) -> Iterator[tuple[str, int, int, Any, np.ndarray, np.ndarray]]:
    """Name, batch, operations, lowered module, the inputs that differ, and what must come out for them."""
    from pipeline import compiler

    rng = np.random.default_rng(0)
    for case, (size, channels) in CONVS.items():
        for batch in BATCHES["conv"]:
            for form in ("sums", "bits"):
                name = f"conv {case} to {form}, batch {batch}"
                if only in name:
                    mod, x, y = _product(target, batch, size, channels, channels, 3, form, rng)
                    operations = 2 * batch * size * size * channels * channels * 9
                    yield name, batch, operations, compiler.lower(mod), x, y
    name = f"gemm {SIDE}"
    if only in name:
        mod, x, y = _product(target, SIDE, 1, SIDE, SIDE, 1, "sums", rng)
        yield name, SIDE, 2 * SIDE**3, compiler.lower(mod), x, y
    for network in NETWORKS:
        for batch in BATCHES[network]:
            name = f"{network}, batch {batch}"
            if only in name:
                yield name, batch, 0, *_network(network, batch, target)


def _product(
    target: Any, batch: int, size: int, channels: int, filters: int, kernel: int, form: str, rng: np.random.Generator
) -> tuple[Any, np.ndarray, np.ndarray]:
    """A convolution of signs as a Relax module, distinct images as words, and NumPy's sums or bits of them."""
    from tvm import relax

    from pipeline.values import Channelwise, Emitter, Real, Signs, Sum
    from tvm_ops import bitplanes
    from tvm_ops.ops.bitserial_conv2d import Geometry
    from tvm_ops.output_transform import Step

    distinct = min(DISTINCT, batch)
    x = rng.choice([-1.0, 1.0], (distinct, size, size, channels)).astype(np.float32)
    signs = rng.choice([-1, 1], (filters, channels, kernel, kernel)).astype(np.int8)
    words = bitplanes.pack(x >= 0)[..., None, :]
    variable = relax.Var("x", relax.TensorType((batch, *words.shape[1:]), "uint32"))
    emitter = Emitter(relax.BlockBuilder(), target)
    shape, pad = (batch, channels, size, size), kernel // 2
    steps = (Step("add", rng.integers(-20, 20, filters).astype(np.float32)),) if form == "bits" else ()
    with emitter.builder.function("main", [variable]):
        with emitter.builder.dataflow():
            codes = Signs(emitter, Channelwise(Real(emitter, variable, shape)), _words=[variable])
            geometry = Geometry((size, size), (kernel, kernel), pads=(pad, pad, pad, pad))
            out = (batch, filters, size, size)
            sums = Channelwise(Sum(emitter, codes, signs, bitplanes.BINARY, geometry, out), steps)
            result = emitter.builder.emit_output(sums.words() if form == "bits" else sums.real())
        emitter.builder.emit_func_output(result)
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    y = np.tensordot(windows, signs.astype(np.float32), ([3, 4, 5], [1, 2, 3]))
    y = bitplanes.pack(y + steps[0].value >= 0)[..., None, :] if steps else y
    return emitter.builder.get(), words, y


def _network(name: str, batch: int, target: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A lowered network of random weights, and its golden pair."""
    import torch

    from pipeline import compiler, importer, models, packaging
    from pipeline.export import export

    torch.manual_seed(0)
    model, shape, classes, options = NETWORKS[name]
    network = models.build(model, shape, classes, models.Quantize(group=16), **options).train()
    with torch.no_grad():  # norms that have seen a batch
        for _ in range(3):
            network(torch.randn(2, *shape))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        export(network.eval(), shape, path)
        inputs, outputs = packaging.golden_pair(path, 1)
        lowered = compiler.lower(importer.load(path, batch, target))
    return lowered, next(iter(inputs.values())), next(iter(outputs.values()))


_RUN = """
extern "C" __attribute__((visibility("default"))) int crossbit_run(char **t, void *given) {{
  const cudaStream_t stream = (cudaStream_t)given;
  cudaError_t status = cudaSuccess;
{launches}
  return (int)status;
}}
extern "C" __attribute__((visibility("default"))) const char *crossbit_error(int status) {{
  return cudaGetErrorString((cudaError_t)status);
}}
"""


def _build(
    folder: Path, name: str, target: Any, nvcc: Any, lowered: Any, inputs: np.ndarray, expected: np.ndarray
) -> dict[str, Any]:
    """One library whose function takes all its tensors, constants and scratch among them; what they are."""
    import targets
    from pipeline import compiler, cuda_kernel, program

    scheduled, _, _ = compiler.scheduled(lowered, target, 1)
    mod = program.straight(scheduled, target.tvm_target(1))
    source, kernels = cuda_kernel.make(program.functions(mod), target.tvm_target(1))
    made = program.line_up(mod, ("y",), kernels, 1)
    tensors = [*made.inputs, *made.outputs, *made.constants]

    def place(tensor: program.Tensor) -> str:
        return f"t[{len(tensors)}] + {tensor.offset}" if tensor.kind == "scratch" else f"t[{tensors.index(tensor)}]"

    lines = [launch.line([place(t) for t in call.tensors]) for call in made.calls for launch in call.kernel.launches]
    text = "\n".join(f"  if (status == cudaSuccess) status = {line};" for line in lines)
    source += "\n#include <cuda_runtime.h>\n" + cuda_kernel.LAUNCH + _RUN.format(launches=text)
    gpus = targets.architectures(target, cuda_kernel.shared_bytes(made.kernels))
    stem = "".join(c if c.isalnum() else "_" for c in name)
    _link(folder / f"{stem}.so", source, gpus, nvcc)
    constants = {f"constant{i}": tensor.data for i, tensor in enumerate(made.constants)}
    np.savez_compressed(folder / f"{stem}.npz", inputs=inputs, expected=expected, **constants)  # type: ignore[arg-type]
    return {
        "name": name,
        "stem": stem,
        "gpus": gpus,
        "launches": len(lines),
        "input": [list(made.inputs[0].shape), made.inputs[0].dtype],
        "output": [list(made.outputs[0].shape), made.outputs[0].dtype],
        "constants": len(made.constants),
        "workspace": max(made.workspace_bytes, 1),
    }


def _link(library: Path, source: str, gpus: tuple[str, ...], nvcc: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        kernels = Path(temporary) / "kernels.o"
        nvcc.compile(source, kernels, gpus)
        nvcc.link_shared(str(library), [str(kernels)], "-Xlinker", "-s")


# Running -------------------------------------------------------------------------------------------------------------


@dataclass
class Timer:
    """Something to time: ``way`` of computing ``subject``.

    Attributes:
        operations: of a call; 0: not counted.
        stream: that its call works on; None: the driver's.
        seconds: so far.
    """

    subject: str
    way: str
    operations: int
    call: Callable[[], object]
    stream: ctypes.c_void_p | None = None
    seconds: list[float] = field(default_factory=list)


def load(driver: Driver, folder: Path, subject: dict[str, Any]) -> Callable[[], None]:
    """A subject's call, after its first result was found to be right.

    Raises:
        ValueError: it has no code for this GPU, or its result is wrong.
    """
    major, minor = driver.capability
    if not any((int(g[3:]) // 10, int(g[3:]) % 10 <= minor) == (major, True) for g in subject["gpus"]):
        raise ValueError(f"{subject['name']}: built for {', '.join(subject['gpus'])}, and this GPU has {major}.{minor}")
    library = ctypes.CDLL(str((folder / f"{subject['stem']}.so").resolve()))
    library.crossbit_error.restype = ctypes.c_char_p
    (shape, dtype), (out_shape, out_dtype) = subject["input"], subject["output"]
    with np.load(folder / f"{subject['stem']}.npz") as arrays:
        given, expected = (_repeated(arrays[key], n) for key, n in (("inputs", shape[0]), ("expected", out_shape[0])))
        constants = [driver.upload(arrays[f"constant{i}"]) for i in range(subject["constants"])]
    size = int(np.prod(out_shape)) * np.dtype(out_dtype).itemsize
    output = driver.upload(np.full(size, 0xA5, np.uint8))
    tensors = [driver.upload(given.astype(dtype)), output, *constants, driver.allocate(subject["workspace"])]
    pointers = (ctypes.c_void_p * len(tensors))(*tensors)

    def call() -> None:
        status = library.crossbit_run(pointers, driver.stream)
        if status:
            raise ValueError(f"{subject['name']}: {library.crossbit_error(status).decode()}")

    call()
    driver.wait()
    found = driver.download(output, out_shape, out_dtype)
    difference = np.abs(found.astype(np.float64) - expected.reshape(out_shape)).max()
    limit = 0.0 if subject["operations"] else TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= limit:
        raise ValueError(f"{subject['name']}: differs by {difference:.3g}, allowed {limit:.3g}; so nothing is timed")
    return call


def _repeated(array: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([array] * -(-count // len(array)))[:count]


def torch_timers(subjects: list[dict[str, Any]]) -> tuple[list[Timer], list[str]]:
    """torch's ways of the subjects, and a sentence for each that is absent."""
    try:
        import torch
    except ImportError as error:
        return [], [f"torch is absent ({error}), so it is not beside"]
    if not torch.cuda.is_available():
        return [], [f"torch {torch.__version__} sees no GPU, so it is not beside"]
    torch.backends.cudnn.benchmark = True
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    timers: list[Timer] = []
    absent: list[str] = []
    half = {"device": "cuda", "dtype": torch.float16}

    def add(subject: dict[str, Any], way: str, call: Callable[[], object]) -> None:
        try:
            with torch.inference_mode():
                call()
                torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError) as error:
            absent.append(f"{way} of {subject['name']}: {str(error).splitlines()[0]}")
            return
        timers.append(Timer(subject["name"], way, subject["operations"], call, stream))

    for subject in subjects:
        kind, batch = subject["name"].split()[0].rstrip(","), subject["batch"]
        if kind == "conv" and "to sums" in subject["name"]:
            size, channels = CONVS[subject["name"].split()[1]]
            x = torch.randn(batch, channels, size, size, **half).to(memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3, **half).to(memory_format=torch.channels_last)
            add(subject, "torch fp16", lambda x=x, w=w: torch.conv2d(x, w, padding=1))
            rows = max(batch * size * size, 32)
            a = torch.randint(-1, 2, (rows, 9 * channels), device="cuda", dtype=torch.int8)
            b = torch.randint(-1, 2, (channels, 9 * channels), device="cuda", dtype=torch.int8).t()
            add(subject, "torch int8, product alone", lambda a=a, b=b: torch._int_mm(a, b))
        elif kind == "gemm":
            x, w = (torch.randn(SIDE, SIDE, **half) for _ in range(2))
            add(subject, "torch fp16", lambda x=x, w=w: x @ w)
            a, b = (torch.randint(-1, 2, (SIDE, SIDE), device="cuda", dtype=torch.int8) for _ in range(2))
            add(subject, "torch int8", lambda a=a, b=b: torch._int_mm(a, b.t()))
        elif kind in NETWORKS:
            try:
                from pipeline import models
            except ImportError as error:
                absent.append(f"torch's {kind}: the network does not load ({error})")
                continue
            name, shape, classes, options = NETWORKS[kind]
            network = models.build(name, shape, classes, None, **options).eval().to(**half)
            network = network.to(memory_format=torch.channels_last)
            x = torch.randn(batch, *shape, **half).to(memory_format=torch.channels_last)

            def forward(network: Any = network, x: Any = x) -> Any:
                with torch.inference_mode():
                    return network(x)

            add(subject, "torch fp16", forward)
            if batch == 1 and timers and timers[-1].subject == subject["name"]:
                graph = torch.cuda.CUDAGraph()
                warm = torch.cuda.Stream()
                with torch.cuda.stream(warm):
                    for _ in range(3):
                        forward()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    forward()
                add(subject, "torch fp16, graph", graph.replay)
    return timers, absent


def run(driver: Driver, folder: Path, rounds: int) -> dict[str, Any]:
    """Check and time the subjects of a folder that `build` wrote."""
    facts = json.loads((folder / "bench.json").read_text())
    timers = []
    for subject in facts["subjects"]:
        call = load(driver, folder, subject)
        timers.append(Timer(subject["name"], "crossbit", subject["operations"], call))
        if subject["batch"] == 1:
            timers.append(Timer(subject["name"], "crossbit, graph", subject["operations"], driver.graph(call)))
        print(f"checked {subject['name']}", flush=True)
    peers, absent = torch_timers(facts["subjects"])
    timers += peers
    if (folder / "peak.so").is_file():
        timers.append(_peak(driver, folder / "peak.so"))
    calls = []
    for timer in timers:  # some 5 ms a round
        driver.seconds(timer.call, 3, timer.stream)
        calls.append(max(1, min(1000, int(0.005 / max(driver.seconds(timer.call, 3, timer.stream), 1e-7)))))
    for _ in range(rounds):
        for timer, count in zip(timers, calls, strict=True):
            timer.seconds.append(driver.seconds(timer.call, count, timer.stream))
    rows = [_row(timer) for timer in timers]
    peak = next((row["tops"] for row in rows if row["subject"] == "peak"), None)
    for row in rows:
        row["of_peak"] = row["tops"] / peak if peak and row["way"].startswith("crossbit") and row["tops"] else None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {key: facts[key] for key in ("target", "nvcc")}
    return {"gpu": driver.name, "date": now, "rounds": rounds, **about, "absent": absent, "rows": rows}


def _peak(driver: Driver, path: Path) -> Timer:
    library, blocks, rounds = ctypes.CDLL(str(path.resolve())), 8 * driver.processors, 2000
    out = ctypes.c_void_p(driver.allocate(1024))

    def call() -> None:
        if status := library.crossbit_peak(out, blocks, rounds, driver.stream):
            raise RuntimeError(f"the peak's loop: CUDA error {status}")

    return Timer("peak", "mma.sync m16n8k256 and.popc, registers", PEAK_OPERATIONS * blocks * rounds, call)


def _row(timer: Timer) -> dict[str, Any]:
    p10, median, p90 = (float(q) for q in np.quantile(timer.seconds, (0.1, 0.5, 0.9)))
    tops = timer.operations / median / 1e12 if timer.operations else None
    times = {"us": median * 1e6, "p10_us": p10 * 1e6, "p90_us": p90 * 1e6}
    return {"subject": timer.subject, "way": timer.way, **times, "tops": tops}


def show(result: dict[str, Any]) -> None:
    print(f"{result['gpu']}, {result['target']}, {result['nvcc']}, {result['date']}; {result['rounds']} rounds")
    for sentence in result["absent"]:
        print(f"absent: {sentence}")
    print(f"{'subject':34} {'way':40} {'us':>10} {'p10':>10} {'p90':>10} {'TOPS':>9} {'of peak':>8}")
    for row in result["rows"]:
        tops = f"{row['tops']:9.1f}" if row["tops"] else f"{'-':>9}"
        share = f"{row['of_peak']:8.1%}" if row["of_peak"] else f"{'-':>8}"
        times = " ".join(f"{row[key]:10.2f}" for key in ("us", "p10_us", "p90_us"))
        print(f"{row['subject']:34} {row['way']:40} {times} {tops} {share}")


def main(arguments: list[str]) -> None:
    """Build, run, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR", help="compile everything to DIR, and time nothing")
    parser.add_argument("--run", type=Path, metavar="DIR", help="time what --build made")
    parser.add_argument("--target", default="", help="what to compile for; default: this machine's GPU")
    parser.add_argument("--only", default="", help="subjects whose name has this in it, and no peak")
    parser.add_argument("--rounds", type=int, default=30, help="of all subjects in turn, 5 ms each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    given = parser.parse_args(arguments)
    if given.build:
        build(given.build, given.target or "cuda-sm90", given.only)
        return
    try:
        driver = Driver()
    except ValueError as error:
        raise ValueError(
            f"{error}: run `scripts/bench_cuda.py --build DIR` here, and `--run DIR` on a machine with one"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.run or Path(temporary)
        if not given.run:
            build(folder, given.target or "cuda-sm{}{}".format(*driver.capability), given.only)
        result = run(driver, folder, given.rounds)
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
