// What emulated device code asks of the runtime (../runtime.cpp), and the warp collectives made of it.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

extern const size_t shared_limit;  // bytes a block of this architecture may have; the rewritten source defines it

struct Launch {
  dim3 grid, block;
  size_t dynamic_bytes, shared_limit;
  const void* kernel;
  void (*body)(void* arguments);
  void* arguments;
  size_t argument_bytes;
};
bool launch(const Launch&);            // runs the grid; false: message() says what went wrong
const char* message();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));  // ends the launch
bool allow_dynamic(const void* kernel, size_t bytes, size_t limit);

// The tensors of a call: the only global memory that its kernels may touch.
struct Arguments {
  Arguments(const void* values, int count);
  ~Arguments();
};

// Memory of an app: so much more that kernels may touch.
void* device_malloc(size_t bytes);
void device_free(void*);

// Constant in the life of a thread, so the compiler may call them once.
__attribute__((const)) dim3 thread_index();
__attribute__((const)) dim3 block_index();
__attribute__((const)) int lane();

// The block's array of the declaration that is number `site` in the source.
void* shared_array(int site, const char* name, size_t bytes, size_t alignment);
void* dynamic_array(size_t alignment);
uint32_t shared_address(const void*);                  // generic pointer -> 32-bit shared address
void shared_read(void* to, uint32_t address, size_t bytes);  // for all lanes of the warp
void shared_write(uint32_t address, const void* from, size_t bytes);

void sync_threads(int line);
void sync_warp_memory(uint32_t mask);                  // orders memory among these lanes
uint32_t live_lanes();

void copy_async(uint32_t destination, const void* source, unsigned bytes, unsigned source_bytes);
void commit_copies();
void wait_copies(unsigned pending);                    // deliver all groups but the `pending` newest
void wait_all_copies();

struct Lanes {
  uint32_t mask;
  const void* in[32];  // null: the lane takes no part
  void* out[32];
};
// True in the last lane of `mask` to come: it computes every lane's result, then calls depart. The others sleep.
bool arrive(const char* name, int line, uint32_t mask, bool whole_warp, const void* in, void* out, Lanes&);
void depart(const Lanes&);

// One warp collective: `all(in, out, mask)` sees what every lane brought and fills what every lane gets.
template <class Out, class In, class All>
Out collective(const char* name, int line, uint32_t mask, bool whole_warp, const In& in, All all) {
  Out out{};
  Lanes lanes;
  if (arrive(name, line, mask, whole_warp, &in, &out, lanes)) {
    const In* ins[32];
    Out* outs[32];
    for (int i = 0; i < 32; i++) {
      ins[i] = static_cast<const In*>(lanes.in[i]);
      outs[i] = static_cast<Out*>(lanes.out[i]);
    }
    all(ins, outs, lanes.mask);
    depart(lanes);
  }
  return out;
}

// The value of the lane that `source(lane)` names; a lane that takes no part gives junk, as a GPU would.
template <class T, class Source>
T shuffle(const char* name, int line, uint32_t mask, const T& value, Source source) {
  struct Asked { T value; int source; };
  return collective<T>(name, line, mask, false, Asked{value, source(lane())}, [](auto in, auto out, uint32_t lanes) {
    for (int i = 0; i < 32; i++) {
      if (!(lanes >> i & 1)) continue;
      if (const auto* from = in[in[i]->source]) *out[i] = from->value;
      else __builtin_memset(out[i], 0xA5, sizeof(T));
    }
  });
}

// The same value for every lane: `step` folds over the lanes that take part.
template <class T, class Step>
T reduce(const char* name, int line, uint32_t mask, T value, T start, Step step) {
  return collective<T>(name, line, mask, false, value, [=](auto in, auto out, uint32_t lanes) {
    T result = start;
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) result = step(result, *in[i], i);
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) *out[i] = result;
  });
}

}  // namespace emu
