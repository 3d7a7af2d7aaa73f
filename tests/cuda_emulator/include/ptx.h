// The PTX instructions that ../emulator.py knows: it turns each one in an asm block into a call of these.
#pragma once
#include <array>
#include <cstdint>

#include "emulator.h"

namespace emu {

template <class... T>
std::array<uint32_t*, sizeof...(T)> destinations(T&... registers) {
  static_assert(((sizeof(T) == 4) && ...), "32-bit registers");
  return {reinterpret_cast<uint32_t*>(&registers)...};
}
template <class... T>
std::array<uint32_t, sizeof...(T)> sources(T... registers) {
  return {static_cast<uint32_t>(registers)...};
}
template <size_t N>
std::array<uint32_t, N> group(const std::array<uint32_t, N>& registers) { return registers; }
static inline std::array<uint32_t, 1> group(uint32_t value) { return {value}; }  // a group of one needs no braces

static inline int dot_and(uint32_t a, uint32_t b) { return __builtin_popcount(a & b); }
static inline int dot_xor(uint32_t a, uint32_t b) { return __builtin_popcount(a ^ b); }
template <class A, class B>
int dot_bytes(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<A>(a >> i) * static_cast<B>(b >> i);
  return sum;
}
static inline int dot_s8(uint32_t a, uint32_t b) { return dot_bytes<int8_t, int8_t>(a, b); }
static inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1u) << i;
  return r;
}

// d = a b + c. Lane 4g + t holds rows g (and g + 8) of A, column g of B: words t (and t + 4) of their k; of C and D
// rows g (and g + 8), columns 2t and 2t + 1. Register i of A: row g + 8 (i % halves), word t + 4 (i / halves).
template <int (*dot)(uint32_t, uint32_t), size_t D, class A, class B>
void mma(const char* name, int line, std::array<uint32_t*, D> d, const A& a_group, const B& b_group,
         const std::array<uint32_t, D>& c) {
  auto a = group(a_group);
  auto b = group(b_group);
  constexpr int halves = D / 2, words = b.size();
  static_assert(a.size() == size_t(halves * words));
  struct In { decltype(a) a_; decltype(b) b_; std::array<uint32_t, D> c_; };
  auto out = collective<std::array<uint32_t, D>>(
      name, line, ~0u, true, In{a, b, c}, [](auto in, auto out, uint32_t) {
        for (int l = 0; l < 32; l++)
          for (int i = 0; i < int(D); i++) {
            uint32_t sum = in[l]->c_[i];
            int row = l / 4, column = l % 4 * 2 + i % 2, half = i / 2;
            for (int w = 0; w < words; w++)
              for (int t = 0; t < 4; t++)
                sum += dot(in[row * 4 + t]->a_[w * halves + half], in[column * 4 + t]->b_[w]);
            (*out[l])[i] = sum;
          }
      });
  for (size_t i = 0; i < D; i++) *d[i] = out[i];
}

// Matrix m is 8 rows of 16 bytes; lane 8m + r brings the address of its row r. Lane 4g + t gets bytes 4t to 4t + 3 of
// row g, or with `trans` 16-bit elements (2t, g) and (2t + 1, g).
template <bool trans, size_t N>
void ldmatrix(const char* name, int line, std::array<uint32_t*, N> d, uint32_t address) {
  auto out = collective<std::array<uint32_t, N>>(
      name, line, ~0u, true, address, [=](auto in, auto out, uint32_t) {
        for (int m = 0; m < int(N); m++) {
          uint16_t element[8][8];
          for (int r = 0; r < 8; r++) {
            int lane = 8 * m + r;
            if (*in[lane] % 16) fail("line %d: %s: the row address of lane %d is not 16-aligned", line, name, lane);
            shared_read(element[r], *in[lane], 16);
          }
          for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            (*out[l])[m] = trans ? element[t][g] | uint32_t(element[t + 1][g]) << 16
                                 : element[g][t] | uint32_t(element[g][t + 1]) << 16;
          }
        }
      });
  for (size_t i = 0; i < N; i++) *d[i] = out[i];
}

// `least`: .ca copies 4, 8 or 16 bytes, .cg only 16. What is not read from the source is filled with zeros.
template <unsigned least, class Source>
void cp_async(uint32_t destination, Source source, unsigned bytes, uint32_t source_bytes) {
  if (bytes < least) fail("cp.async.cg of %u bytes", bytes);
  copy_async(destination, (const void*)source, bytes, source_bytes);
}
template <unsigned least, class Source>
void cp_async(uint32_t destination, Source source, unsigned bytes, bool ignore_source) {
  cp_async<least>(destination, source, bytes, ignore_source ? 0u : uint32_t(bytes));
}
template <unsigned least, class Source>
void cp_async(uint32_t destination, Source source, unsigned bytes) {
  cp_async<least>(destination, source, bytes, uint32_t(bytes));
}
template <size_t N>
void st_shared(uint32_t address, const std::array<uint32_t, N>& values) {
  if (address % sizeof values) fail("st.shared: address 0x%x is not %zu-aligned", address, sizeof values);
  shared_write(address, values.data(), sizeof values);
}
static inline void st_shared(uint32_t address, uint32_t value) { st_shared(address, sources(value)); }

}  // namespace emu
