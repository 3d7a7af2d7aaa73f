/* Classify the images of images.h: a label a line, then the stack that it took, over the debugger's console. */
#include "digits.h"
#include "images.h"
#include "semihosting.h"

#define PAINT 0xC5C5C5C5u

extern uint32_t stack_bottom[], stack_top[]; /* link.ld */

static _Alignas(DIGITS_WORKSPACE_ALIGNMENT) unsigned char workspace[DIGITS_WORKSPACE_BYTES];

static uint32_t largest(const float *values, uint32_t count) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < count; ++i)
    if (values[i] > values[best]) best = i;
  return best;
}

static void paint_stack(void) {
  for (volatile uint32_t *word = stack_bottom; word < (uint32_t *)__builtin_frame_address(0) - 16; ++word) *word = PAINT;
}

static uint32_t stack_bytes(void) {
  const volatile uint32_t *word = stack_bottom;
  while (*word == PAINT) ++word;
  return (uint32_t)((const volatile char *)stack_top - (const volatile char *)word);
}

int main(void) {
  paint_stack();
  for (uint32_t i = 0; i < sizeof images / sizeof *images; ++i) {
    float scores[DIGITS_Y_ELEMENTS];
    const int status = digits_run(images[i], scores, workspace);
    if (status != CROSSBIT_OK) {
      write_text(digits_strerror(status));
      return 1;
    }
    write_number(largest(scores, DIGITS_Y_ELEMENTS));
    write_text("\n");
  }
  write_text("stack: ");
  write_number(stack_bytes());
  write_text(" bytes\n");
  return 0;
}
