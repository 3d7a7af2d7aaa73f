// CUDA's vector types with CUDA's alignments, and their make_ functions.
#pragma once
#define EMU_VECTOR(name, type, wide)                                                                            \
  struct name##1 { type x; };                                                                                   \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                      \
  struct name##3 { type x, y, z; };                                                                             \
  struct alignas(wide) name##4 { type x, y, z, w; };                                                            \
  static inline name##1 make_##name##1(type x) { return {x}; }                                                  \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                       \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                            \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR(char, signed char, 4)
EMU_VECTOR(uchar, unsigned char, 4)
EMU_VECTOR(short, short, 8)
EMU_VECTOR(ushort, unsigned short, 8)
EMU_VECTOR(int, int, 16)
EMU_VECTOR(uint, unsigned, 16)
EMU_VECTOR(long, long, 16)
EMU_VECTOR(ulong, unsigned long, 16)
EMU_VECTOR(longlong, long long, 16)
EMU_VECTOR(ulonglong, unsigned long long, 16)
EMU_VECTOR(float, float, 16)
EMU_VECTOR(double, double, 16)
#undef EMU_VECTOR
