/* The most multiply-accumulates a core can do from registers, nothing loaded or stored, of bits, bytes and floats; and
 * the most bytes it can read.
 *
 * Bits are xor, count, add: with a vector popcount three operations a vector. Without one (x86) the best known count is
 * Harley and Seal's: full adders sum sixteen words before one nibble-table count (Mula, Kurz, Lemire, "Faster population
 * counts using AVX2 instructions", 2018). Independent streams hide the latency.
 *
 * Bytes are multiplied and summed in pairs to 16 bits, or in fours to 32 where an instruction does that.
 *
 * double {binary,integer,float}_macs_per_second(long macs): the best of seven runs of so many.
 * double read_bytes_per_second(long bytes): the same of reading as much memory from end to end; 0 without memory.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__ARM_NEON)
#include <arm_neon.h>
typedef uint8x16_t V;
typedef float32x4_t F;
#define KEEP(v) __asm__ volatile("" : "+w"(v))
#define VECTOR_BITS 128
#define SET(x) vreinterpretq_u8_u64(vdupq_n_u64(x))
#define SET_FLOAT(x) vdupq_n_f32(x)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#elif defined(__AVX512BW__)
#include <immintrin.h>
typedef __m512i V;
typedef __m512 F;
#define KEEP(v) __asm__ volatile("" : "+v"(v))
#define VECTOR_BITS 512
#define SET(x) _mm512_set1_epi64(x)
#define SET_FLOAT(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define XOR(a, b) _mm512_xor_si512(a, b)
#define ADD(a, b) _mm512_add_epi64(a, b)
#define ADD8(a, b) _mm512_add_epi8(a, b)
#define AND(a, b) _mm512_and_si512(a, b)
#define HIGH(a) _mm512_srli_epi16(a, 4)
#define LOOK_UP(t, a) _mm512_shuffle_epi8(t, a)
#define TABLE(t) _mm512_broadcast_i32x4(t)
#define BYTE_SUMS(a) _mm512_sad_epu8(a, _mm512_setzero_si512())
#define SUM3(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0x96)
#define MAJORITY(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0xE8)
#else
#include <immintrin.h>
typedef __m256i V;
typedef __m256 F;
#define KEEP(v) __asm__ volatile("" : "+x"(v))
#define VECTOR_BITS 256
#define SET(x) _mm256_set1_epi64x(x)
#define SET_FLOAT(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define XOR(a, b) _mm256_xor_si256(a, b)
#define ADD(a, b) _mm256_add_epi64(a, b)
#define ADD8(a, b) _mm256_add_epi8(a, b)
#define AND(a, b) _mm256_and_si256(a, b)
#define HIGH(a) _mm256_srli_epi16(a, 4)
#define LOOK_UP(t, a) _mm256_shuffle_epi8(t, a)
#define TABLE(t) _mm256_broadcastsi128_si256(t)
#define BYTE_SUMS(a) _mm256_sad_epu8(a, _mm256_setzero_si256())
#define SUM3(a, b, c) XOR(XOR(a, b), c)
#define MAJORITY(a, b, c) _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, XOR(a, b)))
#endif

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#if defined(__ARM_NEON)
/* Counts of bytes, added up in bytes before they are widened: 31 of at most 8 fit. */
#define STREAMS 4
#define STEP 31
typedef struct { V total; } State;
static inline State step(State s, V a, V w) {
  V sum = vcntq_u8(veorq_u8(a, w));
#pragma GCC unroll 31
  for (int i = 1; i < STEP; i++) {
    KEEP(a);
    sum = vaddq_u8(sum, vcntq_u8(veorq_u8(a, w)));
  }
  s.total = vreinterpretq_u8_u32(vpadalq_u16(vreinterpretq_u32_u8(s.total), vpaddlq_u8(sum)));
  return s;
}
#elif defined(__AVX512VPOPCNTDQ__)
#define STREAMS 12
#define STEP 1
typedef struct { V total; } State;
static inline State step(State s, V a, V w) {
  s.total = ADD(s.total, _mm512_popcnt_epi64(XOR(a, w)));
  return s;
}
#else
#define STREAMS 2
#define STEP 16
typedef struct { V total, ones, twos, fours, eights; } State;
static inline V count(V v) {
  const V low = SET(0x0f0f0f0f0f0f0f0fULL), table = TABLE(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  return BYTE_SUMS(ADD8(LOOK_UP(table, AND(v, low)), LOOK_UP(table, AND(HIGH(v), low))));
}

/* Two words, then four, eight, sixteen; the empty assembly keeps the compiler from computing equal halves once. */
static inline V full_adder(V *sum, V b, V c) {
  V a = *sum;
  *sum = SUM3(a, b, c);
  return MAJORITY(a, b, c);
}
static inline V two(State *s, V a, V w) {
  V x = XOR(a, w);
  return full_adder(&s->ones, x, XOR(x, SET(3)));
}
static inline V four(State *s, V a, V w) {
  V x = two(s, a, w);
  KEEP(a);
  return full_adder(&s->twos, x, two(s, a, w));
}
static inline V eight(State *s, V a, V w) {
  V x = four(s, a, w);
  KEEP(a);
  return full_adder(&s->fours, x, four(s, a, w));
}
static inline State step(State s, V a, V w) {
  V x = eight(&s, a, w);
  KEEP(a);
  s.total = ADD(s.total, count(full_adder(&s.eights, x, eight(&s, a, w))));
  return s;
}
#endif

/* How many rounds of a loop a second: the best of seven runs. */
static double rate(void (*loop)(long rounds), long rounds) {
  double best = 1e9;
  for (int run = 0; run < 7; run++) {
    double t = now();
    loop(rounds);
    t = now() - t;
    if (t < best) best = t;
  }
  return rounds / best;
}

static void binary(long rounds) {
  State s[STREAMS] = {0};
  V a[STREAMS], w = SET(0xfedcba987654321ULL);
  for (int i = 0; i < STREAMS; i++) a[i] = SET(0x123456789abcdefULL * (i + 3));
  for (long k = 0; k < rounds; k++) {
    KEEP(w);
#pragma GCC unroll 12
    for (int i = 0; i < STREAMS; i++) {
      KEEP(a[i]);
      s[i] = step(s[i], a[i], w);
    }
  }
  for (int i = 0; i < STREAMS; i++) KEEP(s[i].total);
}

double binary_macs_per_second(long macs) {
  const long each = STREAMS * STEP * VECTOR_BITS;
  return rate(binary, macs / each + 1) * each;
}

#define SUMS 12

#if defined(__ARM_FEATURE_DOTPROD)
#define PRODUCTS 16
#define MAC(s, a, w) s = vreinterpretq_u8_u32(vdotq_u32(vreinterpretq_u32_u8(s), a, w))
#elif defined(__ARM_NEON)
#define PRODUCTS 8
#define MAC(s, a, w) s = vreinterpretq_u8_u16(vmlal_u8(vreinterpretq_u16_u8(s), vget_low_u8(a), vget_low_u8(w)))
#elif defined(__AVX512VNNI__)
#define PRODUCTS 64
#define MAC(s, a, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(a), "v"(w)) /* GCC copies the sums of its intrinsic */
#elif defined(__AVX512BW__)
#define PRODUCTS 64
#define MAC(s, a, w) KEEP(a); s = _mm512_add_epi16(s, _mm512_maddubs_epi16(a, w))
#else
#define PRODUCTS 32
#define MAC(s, a, w) KEEP(a); s = _mm256_add_epi16(s, _mm256_maddubs_epi16(a, w))
#endif

static void integer(long rounds) {
  V s[SUMS], a = SET(0x123456789abcdefULL), w = SET(0x101010101010101ULL);
#pragma GCC unroll 12  // or the sums stay in memory
  for (int i = 0; i < SUMS; i++) s[i] = SET(i);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) {
      MAC(s[i], a, w);
    }
    KEEP(a);
  }
#pragma GCC unroll 12
  for (int i = 0; i < SUMS; i++) KEEP(s[i]);
}

double integer_macs_per_second(long macs) {
  const long each = SUMS * PRODUCTS;
  return rate(integer, macs / each + 1) * each;
}

static void floats(long rounds) {
  F s[SUMS], a = SET_FLOAT(0.5f), w = SET_FLOAT(1.0f);
  for (int i = 0; i < SUMS; i++) s[i] = SET_FLOAT(i);
  for (long k = 0; k < rounds; k++) {
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) s[i] = FMA(a, w, s[i]);
    KEEP(a);
  }
  for (int i = 0; i < SUMS; i++) KEEP(s[i]);
}

double float_macs_per_second(long macs) {
  const long each = SUMS * VECTOR_BITS / 32;
  return rate(floats, macs / each + 1) * each;
}

#define LOADS 8

static const V *memory; /* what `reading` reads: so many vectors, a multiple of LOADS */
static long vectors;

static void reading(long rounds) {
  for (long k = 0; k < rounds; k++) {
    for (const V *at = memory; at < memory + vectors; at += LOADS) {
#pragma GCC unroll 8
      for (int i = 0; i < LOADS; i++) {
        V loaded = at[i];
        KEEP(loaded);
      }
    }
  }
}

double read_bytes_per_second(long bytes) {
  vectors = (bytes - 1) / (LOADS * sizeof(V)) * LOADS + LOADS;
  const long size = vectors * sizeof(V);
  void *block = aligned_alloc(LOADS * sizeof(V), size);
  if (!block) return 0;
  memory = memset(block, 1, size); /* or no page is there */
  reading(1);                       /* or the first run finds what `memset` left in the caches */
  const double found = rate(reading, (1 << 21) / size + 1) * size;
  free(block);
  return found;
}
