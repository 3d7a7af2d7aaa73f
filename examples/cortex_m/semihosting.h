/* Text and an exit code for the debugger or emulator at the other end. On a product, write to a UART instead. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

#include <stdint.h>

static inline int semihosting(int operation, const void *argument) {
  register int r0 __asm("r0") = operation;
  register const void *r1 __asm("r1") = argument;
  __asm volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static inline void write_text(const char *text) { semihosting(0x04 /* SYS_WRITE0 */, text); }

static inline void write_number(uint32_t number) {
  char text[11], *at = text + sizeof text;
  *--at = '\0';
  do *--at = (char)('0' + number % 10);
  while (number /= 10);
  write_text(at);
}

_Noreturn static inline void leave(int status) {
  const uint32_t block[2] = {0x20026 /* ADP_Stopped_ApplicationExit */, (uint32_t)status};
  for (;;) semihosting(0x20 /* SYS_EXIT_EXTENDED */, block);
}

#endif
