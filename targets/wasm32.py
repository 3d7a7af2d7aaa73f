"""WebAssembly with 128-bit SIMD: browsers since 2021 (Safari 2023), Node.js 16, Wasmtime."""

from targets._target import Target

TARGET = Target(
    name="wasm32",
    machine="wasm32",
    triple="wasm32-unknown-unknown",
    cpu="generic",
    attributes=("+simd128",),
    features=frozenset(),
    vector_bits=128,
    registers=16,  # WebAssembly has no register file; the engines' x86-64 code has 16
    popcount="shifts and adds of a vector",
    source="WebAssembly Core Specification 2.0, vector instructions",
    cflags=("-msimd128",),
    zig_triple="wasm32-wasi",
    tvm_runtime=False,
)
