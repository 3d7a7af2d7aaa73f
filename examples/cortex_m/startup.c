/* From reset to main, for any Cortex-M: vector table, FPU, .data and .bss. A board has more: clocks, caches, its interrupts. */
#include <stdint.h>
#include <string.h>

#include "semihosting.h"

extern uint32_t stack_top[];                                          /* link.ld */
extern char data_load[], data_start[], data_end[], bss_start[], bss_end[];

int main(void);

_Noreturn void reset(void) {
#if defined(__ARM_FP)
  *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* CPACR: full access to the FPU, which also holds M55's vectors */
  __asm volatile("dsb\n isb" ::: "memory");
#endif
  memcpy(data_start, data_load, (size_t)(data_end - data_start));
  memset(bss_start, 0, (size_t)(bss_end - bss_start));
  leave(main());
}

_Noreturn static void fault(void) {
  write_text("fault\n");
  leave(99);
}

typedef void (*vector)(void);
__attribute__((section(".vectors"), used)) static const vector vectors[16] = {
    (vector)stack_top, reset, fault /* NMI */, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, fault,
};
