/* Classify images: classify FILE. FILE holds raw float32 images, one after the other; a label a line is printed. */
#include <stdio.h>

#include "digits.h"

static _Alignas(DIGITS_WORKSPACE_ALIGNMENT) unsigned char workspace[DIGITS_WORKSPACE_BYTES];

static int largest(const float *values, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (values[i] > values[best]) best = i;
  return best;
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE, raw float32 images of %d values each\n", argv[0], DIGITS_X_ELEMENTS);
    return 2;
  }
  FILE *file = fopen(argv[1], "rb");
  if (!file) {
    perror(argv[1]);
    return 1;
  }
  float image[DIGITS_X_ELEMENTS], scores[DIGITS_Y_ELEMENTS];
  size_t bytes;
  while ((bytes = fread(image, 1, sizeof image, file)) == sizeof image) {
    const int status = digits_run(image, scores, workspace);
    if (status != CROSSBIT_OK) {
      fprintf(stderr, "%s\n", digits_strerror(status));
      return 1;
    }
    if (printf("%d\n", largest(scores, DIGITS_Y_ELEMENTS)) < 0) {
      perror("standard output");
      return 1;
    }
  }
  if (ferror(file)) {
    perror(argv[1]);
    return 1;
  }
  if (bytes != 0) {
    fprintf(stderr, "%s: ends inside an image: %zu bytes are left, an image has %zu\n", argv[1], bytes, sizeof image);
    return 1;
  }
  if (fclose(file) != 0 || fflush(stdout) != 0) {
    perror(argv[1]);
    return 1;
  }
  return 0;
}
