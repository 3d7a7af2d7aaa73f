// The part of CUDA C++ that TVM's code generator writes, on the CPU: one fiber for each CUDA thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator.h"
#include "ptx.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_ALIGN__(n) alignas(n)
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
constexpr int warpSize = 32;

// ---- the runtime API of a launch
typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCudartUnloading = 4, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
static inline const char* cudaGetErrorString(cudaError_t) { return emu::message(); }
static inline const char* cudaGetErrorName(cudaError_t) { return "emulated CUDA"; }
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  bool fits = emu::allow_dynamic(reinterpret_cast<const void*>(kernel), bytes, emu::shared_limit);
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
  auto body = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); };
  bool ran = emu::launch({config->gridDim, config->blockDim, config->dynamicSmemBytes, emu::shared_limit,
                          reinterpret_cast<const void*>(kernel), body, &call, sizeof call});
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

// ---- what an app asks of the runtime API; every stream does its work at once
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) { return cudaSuccess; }
static inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return *memory = emu::device_malloc(bytes), *memory ? cudaSuccess : cudaErrorInvalidValue;
}
static inline cudaError_t cudaFree(void* memory) { return emu::device_free(memory), cudaSuccess; }
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return __builtin_memcpy(to, from, bytes), cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// ---- barriers and warp collectives; `line` is the caller's, for messages and to tell two barriers apart
#define EMU_LINE int line = __builtin_LINE()
static inline void __syncthreads(EMU_LINE) { emu::sync_threads(line); }
static inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
  emu::collective<bool>("__syncwarp", line, mask, false, mask,
                        [](auto, auto, uint32_t lanes) { emu::sync_warp_memory(lanes); });
}
static inline unsigned __activemask() { return emu::live_lanes(); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_LINE) {
  return emu::shuffle("__shfl_sync", line, mask, value,
                      [=](int lane) { return (lane & -width) + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_LINE) {
  return emu::shuffle("__shfl_xor_sync", line, mask, value, [=](int lane) {
    return (lane ^ bits) < (lane & -width) + width ? lane ^ bits : lane;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_LINE) {
  return emu::shuffle("__shfl_down_sync", line, mask, value, [=](int lane) {
    int from = lane + static_cast<int>(distance);
    return from < (lane & -width) + width ? from : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_LINE) {
  return emu::shuffle("__shfl_up_sync", line, mask, value, [=](int lane) {
    int from = lane - static_cast<int>(distance);
    return from >= (lane & -width) ? from : lane;
  });
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_LINE) {
  return emu::reduce<unsigned>("__ballot_sync", line, mask, predicate != 0, 0,
                               [](unsigned bits, unsigned bit, int lane) { return bits | bit << lane; });
}
static inline int __any_sync(unsigned mask, int predicate, EMU_LINE) {
  return emu::reduce<int>("__any_sync", line, mask, predicate != 0, 0, [](int a, int b, int) { return a | b; });
}
static inline int __all_sync(unsigned mask, int predicate, EMU_LINE) {
  return emu::reduce<int>("__all_sync", line, mask, predicate != 0, 1, [](int a, int b, int) { return a & b; });
}
#define EMU_REDUCE(name, T, start, expression)                                                            \
  static inline T name(unsigned mask, T value, EMU_LINE) {                                                \
    return emu::reduce<T>(#name, line, mask, value, start, [](T a, T b, int) -> T { return expression; }); \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, 0u, a + b)
EMU_REDUCE(__reduce_add_sync, int, 0, int(unsigned(a) + unsigned(b)))
EMU_REDUCE(__reduce_min_sync, unsigned, ~0u, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, INT32_MAX, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, 0u, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, INT32_MIN, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, ~0u, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, 0u, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, 0u, a ^ b)

// ---- memory and arithmetic
static inline size_t __cvta_generic_to_shared(const void* p) { return emu::shared_address(p); }
static inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) { return *p; }
static inline float min(float a, float b) { return std::fmin(a, b); }
static inline float max(float a, float b) { return std::fmax(a, b); }
template <class A, class B, class C = std::common_type_t<A, B>>
C min(A a, B b) { return C(b) < C(a) ? C(b) : C(a); }
template <class A, class B, class C = std::common_type_t<A, B>>
C max(A a, B b) { return C(a) < C(b) ? C(b) : C(a); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
static inline int __dp4a(int a, int b, int c) { return emu::dot_s8(a, b) + c; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
#define __expf(x) std::exp(float(x))  // libm declares these names
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
static inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
static inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
template <class To, class From>
To emu_bits(From x) {
  To r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
static inline int __float_as_int(float x) { return emu_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return emu_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
