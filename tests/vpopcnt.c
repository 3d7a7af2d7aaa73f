/* VPOPCNTB/W/D/Q (AVX512_BITALG, AVX512_VPOPCNTDQ) on a CPU that has AVX-512 without them: what such an instruction
 * does is done by a handler of the fault that it raises, everything else by the CPU. Encoding: Intel SDM vol. 2, 2.7
 * (EVEX); where registers lie in a signal's frame: vol. 1, 13.4 (XSAVE, standard format). x86-64 Linux. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static struct sigaction before;
static unsigned long emulated;

enum { SSE = 1, AVX = 2, OPMASK = 5, ZMM_HI256 = 6, HI16_ZMM = 7 }; /* components of the XSAVE area */

/* Where a component lies, which is not there (all zeros) if nothing used it yet. */
static uint8_t *component(uint8_t *area, int which) {
  unsigned size, offset = 160, c, d;
  if (which == SSE)
    size = 256;
  else
    __cpuid_count(13, which, size, offset, c, d);
  uint64_t *in_use = (uint64_t *)(area + 512);
  if (!(*in_use >> which & 1)) memset(area + offset, 0, size);
  *in_use |= 1ull << which;
  return area + offset;
}

/* The 16-byte pieces of a vector register. */
static void pieces(uint8_t *area, int number, uint8_t *piece[4]) {
  if (number >= 16) {
    for (int i = 0; i < 4; ++i) piece[i] = component(area, HI16_ZMM) + 64 * (number - 16) + 16 * i;
    return;
  }
  piece[0] = component(area, SSE) + 16 * number;
  piece[1] = component(area, AVX) + 16 * number;
  piece[2] = component(area, ZMM_HI256) + 32 * number;
  piece[3] = piece[2] + 16;
}

static int64_t general(const greg_t *registers, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return registers[order[number]];
}

/* The length of the instruction, which is carried out; 0: it is another one. */
static int step(const uint8_t *code, greg_t *registers, uint8_t *area) {
  int opcode = code[4], modrm = code[5], length = 6;
  if (code[0] != 0x62 || (code[1] & 7) != 2 || (code[2] & 3) != 1 || (opcode & ~1) != 0x54) return 0;
  int wide = code[2] >> 7, bytes = (opcode == 0x54 ? 1 : 4) << wide, width = 16 << (code[3] >> 5 & 3);
  int broadcast = code[3] >> 4 & 1, zeroing = code[3] >> 7;
  int x = !(code[1] & 0x40) << 3, b = !(code[1] & 0x20) << 3;
  int mod = modrm >> 6, rm = modrm & 7;
  uint8_t source[64], *piece[4];
  if (mod == 3) {
    pieces(area, rm | b | x << 1, piece);
    for (int i = 0; i < 4; ++i) memcpy(source + 16 * i, piece[i], 16);
  } else {
    int64_t address = 0;
    int base = rm | b, far = mod == 2;
    if (rm == 4) {
      int sib = code[length++], index = (sib >> 3 & 7) | x;
      base = (sib & 7) | b;
      if (index != 4) address += general(registers, index) << (sib >> 6);
    }
    if (mod == 0 && (base & 7) == 5) { /* relative to the next instruction, or without a base */
      far = 1;
      if (rm == 5) address += (int64_t)code + length + 4;
    } else {
      address += general(registers, base);
    }
    if (far) {
      int32_t displacement;
      memcpy(&displacement, code + length, 4);
      address += displacement, length += 4;
    } else if (mod == 1) {
      address += (int8_t)code[length++] * (broadcast ? bytes : width);
    }
    for (int i = 0; i < width; i += broadcast ? bytes : width)
      memcpy(source + i, (const void *)address, broadcast ? bytes : width);
  }
  uint64_t mask = ~0ull;
  if (code[3] & 7) memcpy(&mask, component(area, OPMASK) + 8 * (code[3] & 7), 8);
  pieces(area, (modrm >> 3 & 7) | !(code[1] & 0x80) << 3 | !(code[1] & 0x10) << 4, piece);
  for (int i = 0; i < 64; i += bytes) {
    uint64_t lane = 0;
    if (i < width && mask >> i / bytes & 1) {
      memcpy(&lane, source + i, bytes);
      lane = __builtin_popcountll(lane);
    } else if (i < width && !zeroing) {
      continue;
    }
    memcpy(piece[i / 16] + i % 16, &lane, bytes); /* what lies above the vector becomes 0 */
  }
  return length;
}

static void on_fault(int number, siginfo_t *info, void *context) {
  (void)number, (void)info;
  mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
  int length = step((const uint8_t *)machine->gregs[REG_RIP], machine->gregs, (uint8_t *)machine->fpregs);
  machine->gregs[REG_RIP] += length;
  if (length)
    __atomic_fetch_add(&emulated, 1, __ATOMIC_RELAXED);
  else
    sigaction(SIGILL, &before, NULL); /* which then meets the same fault */
}

void begin(void) {
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, &before);
}

void end(void) { sigaction(SIGILL, &before, NULL); }

/* How many instructions were emulated until now. */
unsigned long count(void) { return emulated; }
