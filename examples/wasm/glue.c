/* What JavaScript sees of the network: where to write an image, where its scores are, and run. */
#include "digits.h"

#define EXPORT(name) __attribute__((export_name(name)))

static _Alignas(DIGITS_WORKSPACE_ALIGNMENT) unsigned char workspace[DIGITS_WORKSPACE_BYTES];
static float image[DIGITS_X_ELEMENTS], scores[DIGITS_Y_ELEMENTS];

EXPORT("input") float *input(void) { return image; }
EXPORT("output") float *output(void) { return scores; }
EXPORT("input_elements") int input_elements(void) { return DIGITS_X_ELEMENTS; }
EXPORT("output_elements") int output_elements(void) { return DIGITS_Y_ELEMENTS; }

/* 0, or what error(status) says. */
EXPORT("run") int run(void) { return digits_run(image, scores, workspace); }
EXPORT("error") const char *error(int status) { return digits_strerror(status); }
