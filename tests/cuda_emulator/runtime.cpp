// The emulated GPU: runs one block at a time, each CUDA thread on its own fiber, and checks what it does to memory.
//
// Generated code is compiled with GCC's thread and alignment sanitizers, but this file takes the place of their
// libraries: every load and store of a kernel comes to `access` below. Shared memory has a shadow that knows, for each
// byte, who wrote and read it last, and since which barrier; so a missing barrier is found in any order of threads.
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "include/emulator.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#else
extern "C" void emu_switch(void** save, void** load);
#endif

namespace {

constexpr int kThreads = 1024, kWarp = 32;
constexpr size_t kStack = 64 << 10;    // frames above 32 KiB are refused when a kernel is compiled
constexpr size_t kArena = 512 << 10;   // shared memory and the gaps between its arrays
constexpr size_t kGap = 1 << 10;

// ---- fibers: what a function must keep goes on its stack, and the stack pointers change places
#if defined(__x86_64__)
typedef void* Context;
asm(R"(.text
.type emu_switch, @function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context = top;
}
#else
typedef ucontext_t Context;
void emu_switch(Context* save, Context* load) { swapcontext(save, load); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, entry, 0);
}
#endif

struct Copy { uint32_t to; const char* from; unsigned bytes, source_bytes; };
enum State { kReady, kBarrier, kCollective, kDone };
struct Fiber {
  Context context;
  State state;
  int index;
  dim3 thread;
  const char* name;  // of the collective or barrier it waits in
  int line;
  uint32_t mask;
  const void* in;
  void* out;
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first; the last one is still open
};
struct Array { int site; std::string name; size_t begin, bytes; };
struct Byte {  // what happened to a byte of shared memory; epochs count block barriers, syncs count __syncwarp
  uint32_t write_epoch, write_sync, read_epoch, read_sync;
  int16_t writer, reader;
  uint8_t readers;  // kOne, or all of one warp, or many
  bool in_flight;
};
enum Readers : uint8_t { kOne, kOneWarp, kMany };
struct Range { const char* begin; size_t bytes; };

alignas(4096) char stacks[kThreads][kStack];
alignas(4096) char arena[kArena];
Byte shadow[kArena];
Fiber fibers[kThreads];
uint32_t exited[kThreads / kWarp], syncs[kThreads / kWarp];
uint32_t epoch;
Fiber* current;  // null: host code runs
Context scheduler;
const emu::Launch* running;
dim3 block;
int threads;
bool failed;
std::string text = "no error";
std::vector<Array> arrays;
size_t arena_used, shared_used;
std::vector<Range> tensors;
std::map<const void*, size_t> dynamic_limits;
struct { uint32_t address; std::string before, what; } suspect;  // a write that races unless it changes nothing

std::string format(const char* pattern, va_list values) {
  char buffer[1024];
  vsnprintf(buffer, sizeof buffer, pattern, values);
  return buffer;
}
std::string say(const char* pattern, ...) {
  va_list values;
  va_start(values, pattern);
  std::string result = format(pattern, values);
  va_end(values);
  return result;
}
std::string triple(dim3 d) { return say("(%u, %u, %u)", d.x, d.y, d.z); }
std::string thread_name(int index) { return "thread " + triple(fibers[index].thread); }
int warps() { return (threads + kWarp - 1) / kWarp; }
uint32_t present(int warp) { return threads - warp * kWarp >= kWarp ? ~0u : (1u << (threads - warp * kWarp)) - 1; }

void leave() { emu_switch(&current->context, &scheduler); }

// Another thread wrote or read this byte with no barrier since.
bool unordered(int thread, uint32_t at_epoch, uint32_t at_sync) {
  if (thread == current->index || at_epoch != epoch) return false;
  return thread / kWarp != current->index / kWarp || at_sync >= syncs[thread / kWarp];
}

void settle() {  // two threads may write one value to one place
  if (suspect.before.empty()) return;
  std::string before, what;
  before.swap(suspect.before);
  what.swap(suspect.what);
  if (std::memcmp(arena + suspect.address, before.data(), before.size())) emu::fail("%s", what.c_str());
}

const Array& array_of(uint32_t address, size_t bytes, const char* verb) {
  const Array* nearest = nullptr;
  for (const Array& a : arrays) {
    if (address >= a.begin && address + bytes <= a.begin + a.bytes) return a;
    if (address >= a.begin && (!nearest || a.begin > nearest->begin)) nearest = &a;
  }
  if (!nearest) emu::fail("%s %zu bytes before the first shared array", verb, bytes);
  emu::fail("%s %zu bytes at byte %zu of shared array %s, which has %zu", verb, bytes, address - nearest->begin,
            nearest->name.c_str(), nearest->bytes);
}

void read_shared(uint32_t address, size_t bytes, bool by_warp) {
  const Array& array = array_of(address, bytes, "reads");
  int thread = current->index;
  uint32_t sync = syncs[thread / kWarp];
  for (size_t i = address; i < address + bytes; i++) {
    Byte& b = shadow[i];
    if (b.in_flight)
      emu::fail("reads byte %zu of shared array %s while a cp.async of %s is in flight: a commit or wait is missing",
                i - array.begin, array.name.c_str(), thread_name(b.writer).c_str());
    bool just_written = b.write_epoch == epoch && b.write_sync >= sync;  // by this lane, and others read it
    if (unordered(b.writer, b.write_epoch, b.write_sync) || (by_warp && just_written))
      emu::fail("reads byte %zu of shared array %s, which %s wrote with no barrier since", i - array.begin,
                array.name.c_str(), thread_name(b.writer).c_str());
    if (b.read_epoch != epoch) b.readers = by_warp ? kOneWarp : kOne;
    else if (b.reader / kWarp != thread / kWarp) b.readers = kMany;
    else if (b.reader != thread || by_warp) b.readers = std::max<uint8_t>(b.readers, kOneWarp);
    b.reader = thread;
    b.read_epoch = epoch;
    b.read_sync = sync;
  }
}

// `certain`: the value comes later (cp.async), so whether it changes the byte cannot be seen.
void write_shared(uint32_t address, size_t bytes, bool certain) {
  const Array& array = array_of(address, bytes, "writes");
  int thread = current->index;
  for (size_t i = address; i < address + bytes; i++) {
    Byte& b = shadow[i];
    if (b.in_flight)
      emu::fail("writes byte %zu of shared array %s while a cp.async of %s is in flight", i - array.begin,
                array.name.c_str(), thread_name(b.writer).c_str());
    const char* verb = nullptr;
    int other = b.writer;
    if (unordered(b.writer, b.write_epoch, b.write_sync)) verb = "wrote";
    // After kOneWarp the last reader stands for all: only a __syncwarp later than every read orders a write.
    if (b.read_epoch == epoch && (b.readers == kMany || unordered(b.reader, epoch, b.read_sync) ||
                                  (b.readers == kOneWarp && b.read_sync >= syncs[b.reader / kWarp])))
      verb = "read", other = b.reader;
    if (verb) {
      bool many = other == b.reader && b.read_epoch == epoch && b.readers != kOne;
      std::string who = many ? "other threads" : thread_name(other);
      std::string what = say("writes byte %zu of shared array %s, which %s %s with no barrier since", i - array.begin,
                             array.name.c_str(), who.c_str(), verb);
      if (certain) emu::fail("%s", what.c_str());
      if (suspect.before.empty()) suspect = {address, std::string(arena + address, bytes), what};
    }
    b.writer = thread;
    b.write_epoch = epoch;
    b.write_sync = syncs[thread / kWarp];
    b.read_epoch = 0;
  }
}

void check_tensor(const char* p, size_t bytes, const char* verb) {
  static const bool unknown = getenv("CUDA_EMULATOR_ANY_MEMORY");  // of an app that allocates behind our back
  if (unknown) return;
  for (const Range& r : tensors)
    if (p >= r.begin && p + bytes <= r.begin + r.bytes) return;
  std::string where = "memory that is in no tensor of the call";
  ptrdiff_t nearest = 4096;
  for (size_t i = 0; i + 1 < tensors.size(); i++) {  // the last range is the kernel's arguments
    const Range& r = tensors[i];
    ptrdiff_t before = r.begin - p, after = p - (r.begin + static_cast<ptrdiff_t>(r.bytes)) + 1;
    if (std::max(before, after) >= nearest) continue;
    nearest = std::max(before, after);
    where = before > 0 ? say("%td bytes before tensor argument %zu", before, i)
                       : say("byte %td of tensor argument %zu, which has %zu", -before, i, r.bytes);
  }
  emu::fail("%s %zu bytes at %s", verb, bytes, where.c_str());
}

void access(const void* address, size_t bytes, bool write) {
  if (!current) return;
  const char* p = static_cast<const char*>(address);
  if (p >= arena && p < arena + kArena) {
    settle();
    if (write) write_shared(p - arena, bytes, false);
    else read_shared(p - arena, bytes, false);
  } else if (!(p >= stacks[0] && p < stacks[kThreads])) {
    check_tensor(p, bytes, write ? "writes" : "reads");
  }
}

void entry() {
  running->body(running->arguments);
  settle();
  current->state = kDone;
  exited[current->index / kWarp] |= 1u << current->index % kWarp;
  leave();
}

void fail_block(const std::string& what) {
  text = "block " + triple(block) + ": " + what;
  failed = true;
}

void release_barrier(int waiting) {
  const Fiber& first = *std::find_if(fibers, fibers + threads, [](const Fiber& f) { return f.state == kBarrier; });
  if (waiting < threads)
    return fail_block(say("%d threads returned before the __syncthreads of line %d that others wait at",
                          threads - waiting, first.line));
  for (int i = 1; i < threads; i++)
    if (fibers[i].line != first.line)
      return fail_block(say("divergent barriers: %s waits at the __syncthreads of line %d, %s at that of line %d",
                            thread_name(0).c_str(), first.line, thread_name(i).c_str(), fibers[i].line));
  for (int i = 0; i < threads; i++) fibers[i].state = kReady;
  epoch++;
}

void report_deadlock() {
  std::map<std::string, int> waits;
  for (int i = 0; i < threads; i++) {
    const Fiber& f = fibers[i];
    waits[f.state == kDone ? "have returned" : say("wait at the %s of line %d", f.name, f.line)]++;
  }
  std::string what = "deadlock:";
  for (auto& [wait, count] : waits) what += say(" %d threads %s;", count, wait.c_str());
  what.pop_back();
  fail_block(what);
}

// Orders of threads: 0 first to last, 1 last to first, others random with that seed.
struct Order {
  unsigned kind = 0;
  uint64_t random;
  Order() {
    if (const char* value = std::getenv("CUDA_EMULATOR_ORDER")) kind = std::strtoul(value, nullptr, 10);
    random = 0x9E3779B97F4A7C15u * (kind + 1);
  }
  void arrange(std::vector<int>& v) {
    if (kind == 1) std::sort(v.rbegin(), v.rend());
    if (kind < 2) return;
    for (size_t i = v.size(); i > 1; i--) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      std::swap(v[i - 1], v[random % i]);
    }
  }
};

void run_block(Order& order) {
  epoch++;
  for (const Array& a : arrays) std::memset(arena + a.begin, 0xA5, a.bytes);  // nothing is left of the last block
  for (int i = 0; i < threads; i++) {
    dim3 size = running->block;
    Fiber& f = fibers[i];
    f.state = kReady;
    f.index = i;
    f.thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    f.copies.assign(1, {});
    prepare(f.context, stacks[i], entry);
  }
  std::fill(exited, exited + warps(), 0);
  std::vector<int> warp_order(warps()), lane_order(kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  while (!failed) {
    bool progress = false;
    order.arrange(warp_order);
    for (int warp : warp_order) {
      for (bool ran = true; ran && !failed;) {  // a warp goes on until all its lanes wait for another warp
        ran = false;
        order.arrange(lane_order);
        for (int lane : lane_order) {
          int i = warp * kWarp + lane;
          if (i >= threads || fibers[i].state != kReady || failed) continue;
          current = &fibers[i];
          emu_switch(&scheduler, &current->context);
          current = nullptr;
          progress = ran = true;
        }
      }
    }
    int waiting = 0, done = 0;
    for (int i = 0; i < threads; i++) waiting += fibers[i].state == kBarrier, done += fibers[i].state == kDone;
    if (failed || done == threads) break;
    if (waiting && waiting + done == threads) release_barrier(waiting);
    else if (!progress) report_deadlock();
  }
  for (int i = 0; i < threads; i++)  // copies that nobody waited for
    for (auto& group : fibers[i].copies)
      for (Copy& c : group)
        for (unsigned b = 0; b < c.bytes; b++) shadow[c.to + b].in_flight = false;
}

void deliver(Fiber& f, size_t groups) {
  settle();
  for (size_t g = 0; g < groups; g++)
    for (Copy& c : f.copies[g]) {
      std::memcpy(arena + c.to, c.from, c.source_bytes);
      std::memset(arena + c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
      for (unsigned i = 0; i < c.bytes; i++) {
        Byte& b = shadow[c.to + i];
        b.in_flight = false;
        b.write_epoch = epoch;
        b.write_sync = syncs[f.index / kWarp];
      }
    }
  f.copies.erase(f.copies.begin(), f.copies.begin() + groups);
}

size_t allocate(int site, const char* name, size_t bytes, size_t alignment) {
  size_t begin = (arena_used + kGap + alignment - 1) / alignment * alignment;
  if (begin + bytes > kArena) emu::fail("shared array %s of %zu bytes does not fit", name, bytes);
  arrays.push_back({site, name, begin, bytes});
  arena_used = begin + bytes;
  std::memset(arena + begin, 0xA5, bytes);
  return begin;
}

}  // namespace

namespace emu {

const char* message() { return text.c_str(); }

void fail(const char* pattern, ...) {
  va_list values;
  va_start(values, pattern);
  std::string what = format(pattern, values);
  va_end(values);
  failed = true;
  text = say("block %s, thread %s: %s", triple(block).c_str(), triple(current->thread).c_str(), what.c_str());
  suspect.before.clear();
  leave();
  std::abort();  // a launch that failed resumes nobody
}

bool allow_dynamic(const void* kernel, size_t bytes, size_t limit) {
  if (bytes > limit) {
    text = say("%zu bytes of dynamic shared memory; this architecture has %zu a block", bytes, limit);
    return false;
  }
  dynamic_limits[kernel] = bytes;
  return true;
}

bool launch(const Launch& l) {
  size_t count = size_t(l.block.x) * l.block.y * l.block.z;
  size_t allowed = dynamic_limits.count(l.kernel) ? dynamic_limits[l.kernel] : 48 << 10;
  if (!count || count > kThreads || l.block.z > 64) text = say("a block of %s threads", triple(l.block).c_str());
  else if (!l.grid.x || l.grid.x > 0x7fffffffu || !l.grid.y || l.grid.y > 65535 || !l.grid.z || l.grid.z > 65535)
    text = say("a grid of %s blocks", triple(l.grid).c_str());
  else if (l.dynamic_bytes > allowed)
    text = say("%zu bytes of dynamic shared memory, and the kernel is allowed %zu", l.dynamic_bytes, allowed);
  else {
    running = &l;
    threads = count;
    failed = false;
    arrays.clear();
    arena_used = shared_used = 0;
    if (l.dynamic_bytes) allocate(-1, "of dynamic memory", l.dynamic_bytes, 1024);
    shared_used = l.dynamic_bytes;
    tensors.push_back({static_cast<const char*>(l.arguments), l.argument_bytes});
    Order order;
    std::vector<int> blocks(size_t(l.grid.x) * l.grid.y * l.grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    order.arrange(blocks);
    for (int i : blocks) {
      block = dim3(i % l.grid.x, i / l.grid.x % l.grid.y, i / l.grid.x / l.grid.y);
      run_block(order);
      if (failed) break;
    }
    tensors.pop_back();
    return !failed;
  }
  return false;
}

Arguments::Arguments(const void* values, int count) {
  const TVMFFIAny* any = static_cast<const TVMFFIAny*>(values);
  tensors.clear();
  for (int i = 0; i < count; i++) {
    const DLTensor* t = nullptr;
    if (any[i].type_index == kTVMFFIDLTensorPtr) t = static_cast<const DLTensor*>(any[i].v_ptr);
    if (any[i].type_index == kTVMFFITensor) t = TVMFFITensorGetDLTensorPtr(any[i].v_obj);
    if (!t) continue;
    size_t bytes = (t->dtype.bits * t->dtype.lanes + 7) / 8;
    for (int d = 0; d < t->ndim; d++) bytes *= t->shape[d];
    tensors.push_back({static_cast<const char*>(t->data) + t->byte_offset, bytes});
  }
}
Arguments::~Arguments() { tensors.clear(); }

void* device_malloc(size_t bytes) {
  const size_t whole = (bytes + 255) / 256 * 256;
  void* memory = aligned_alloc(256, whole);
  if (memory) memset(memory, 0xA5, whole), tensors.push_back({static_cast<const char*>(memory), bytes});
  return memory;
}
void device_free(void* memory) {
  for (size_t i = 0; i < tensors.size(); i++)
    if (tensors[i].begin == memory) tensors.erase(tensors.begin() + i);
  free(memory);
}

dim3 thread_index() { return current->thread; }
dim3 block_index() { return block; }
int lane() { return current->index % kWarp; }
uint32_t live_lanes() { return present(current->index / kWarp) & ~exited[current->index / kWarp]; }

void* shared_array(int site, const char* name, size_t bytes, size_t alignment) {
  for (const Array& a : arrays)
    if (a.site == site) return arena + a.begin;
  shared_used += bytes;
  if (shared_used - running->dynamic_bytes > 48 << 10 || shared_used > running->shared_limit)
    fail("shared arrays of %zu bytes, %zu of them dynamic; 48 KiB are allowed without dynamic ones, %zu in all",
         shared_used, running->dynamic_bytes, running->shared_limit);
  return arena + allocate(site, name, bytes, alignment);
}
void* dynamic_array(size_t alignment) {
  if (!running->dynamic_bytes) fail("uses dynamic shared memory, and the launch asks for none");
  if (alignment > 1024) fail("dynamic shared memory cannot be %zu-aligned", alignment);
  return arena + arrays[0].begin;
}
uint32_t shared_address(const void* p) {
  if (p < arena || p > arena + kArena) fail("takes the shared address of a pointer that is not to shared memory");
  return static_cast<const char*>(p) - arena;
}
void shared_read(void* to, uint32_t address, size_t bytes) {
  settle();
  read_shared(address, bytes, true);
  std::memcpy(to, arena + address, bytes);
}
void shared_write(uint32_t address, const void* from, size_t bytes) {
  settle();
  write_shared(address, bytes, false);
  std::memcpy(arena + address, from, bytes);
}

void sync_threads(int line) {
  settle();
  current->state = kBarrier;
  current->name = "__syncthreads";
  current->line = line;
  leave();
}
void sync_warp_memory(uint32_t mask) {
  if (mask == live_lanes()) syncs[current->index / kWarp]++;
}

bool arrive(const char* name, int line, uint32_t mask, bool whole_warp, const void* in, void* out, Lanes& lanes) {
  settle();
  int warp = current->index / kWarp;
  Fiber* first = &fibers[warp * kWarp];
  uint32_t needed = mask & present(warp);
  if (!(mask >> lane() & 1)) fail("line %d: the mask 0x%08x of %s does not name the calling lane", line, mask, name);
  if (whole_warp && present(warp) != ~0u) fail("line %d: %s needs a whole warp", line, name);
  if (needed & exited[warp]) fail("line %d: the mask 0x%08x of %s names lanes that have returned", line, mask, name);
  current->state = kCollective;
  current->name = name;
  current->line = line;
  current->mask = mask;
  current->in = in;
  current->out = out;
  uint32_t here = 0;
  for (int i = 0; i < kWarp; i++) {
    if (!(needed >> i & 1) || first[i].state != kCollective) continue;
    if (std::strcmp(first[i].name, name) || first[i].line != line || first[i].mask != mask)
      fail("lanes of a warp in different collectives: %s of line %d with mask 0x%08x; lane %d in %s of line %d with "
           "mask 0x%08x", name, line, mask, i, first[i].name, first[i].line, first[i].mask);
    here |= 1u << i;
  }
  if (here != needed) {
    leave();
    return false;
  }
  lanes.mask = needed;
  for (int i = 0; i < kWarp; i++) {
    lanes.in[i] = needed >> i & 1 ? first[i].in : nullptr;
    lanes.out[i] = needed >> i & 1 ? first[i].out : nullptr;
  }
  return true;
}
void depart(const Lanes& lanes) {
  for (int i = 0; i < kWarp; i++)
    if (lanes.mask >> i & 1) fibers[current->index / kWarp * kWarp + i].state = kReady;
}

void copy_async(uint32_t to, const void* from, unsigned bytes, unsigned source_bytes) {
  settle();
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes", bytes);
  if (source_bytes > bytes) fail("cp.async of %u bytes from a source of %u", bytes, source_bytes);
  if (to % bytes) fail("cp.async of %u bytes to a shared address that is not %u-aligned", bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async of %u bytes from an address that is not %u-aligned", bytes, bytes);
  if (source_bytes) check_tensor(static_cast<const char*>(from), source_bytes, "cp.async reads");
  write_shared(to, bytes, true);
  for (unsigned i = 0; i < bytes; i++) shadow[to + i].in_flight = true;
  current->copies.back().push_back({to, static_cast<const char*>(from), bytes, source_bytes});
}
void commit_copies() { current->copies.emplace_back(); }
void wait_copies(unsigned pending) {
  size_t committed = current->copies.size() - 1;
  if (committed > pending) deliver(*current, committed - pending);
}
void wait_all_copies() {
  commit_copies();
  wait_copies(0);
}

}  // namespace emu

// ---- what the compiler's sanitizers call
extern "C" {
#define EMU_ACCESS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { access(p, bytes, false); }                             \
  void __tsan_write##bytes(void* p) { access(p, bytes, true); }                             \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false); }                   \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true); }                   \
  void __tsan_volatile_read##bytes(void* p) { access(p, bytes, false); }                    \
  void __tsan_volatile_write##bytes(void* p) { access(p, bytes, true); }
EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

struct Type { uint16_t kind, info; char name[1]; };
struct Misaligned { const char* file; uint32_t line, column; const Type* type; uint8_t log_alignment; };
void __ubsan_handle_type_mismatch_v1(Misaligned* at, uintptr_t p) {
  if (current)
    emu::fail("line %u: the address of a %s is not %u-aligned", at->line, at->type->name, 1u << at->log_alignment);
}
}
