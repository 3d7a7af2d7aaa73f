/* time_library ROUNDS CALLS: the median over rounds of the microseconds of a call of a free-standing network.
   With ROUNDS 0, one call, and the peak resident bytes. Compile with -DHEADER='"m.h"' -DNAME=m -DIN=M_X_ELEMENTS -DOUT=... */
#define _POSIX_C_SOURCE 199309L
#include HEADER

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define JOIN(a, b) a##b
#define FUNCTION(name) JOIN(name, _run)

static float input[IN], output[OUT];
static char memory[WORKSPACE] __attribute__((aligned(64)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec * 1e-3;
}

static int compare(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static long peak_bytes(void) {
  char line[256];
  long kilobytes = -1;
  FILE *status = fopen("/proc/self/status", "r");
  while (status && fgets(line, sizeof line, status) && sscanf(line, "VmHWM: %ld", &kilobytes) != 1) {
  }
  if (status) fclose(status);
  return kilobytes * 1024;
}

int main(int count, char **arguments) {
  if (count != 3) return 2;
  const int rounds = atoi(arguments[1]), calls = atoi(arguments[2]);
  for (int i = 0; i < IN; ++i) input[i] = (float)(i * 37 % 64) / 32 - 1;
  if (FUNCTION(NAME)(input, output, memory)) return 1;
  if (!rounds) return printf("%ld\n", peak_bytes()) < 0;
  double *times = malloc(sizeof *times * (size_t)rounds);
  if (!times) return 1;
  for (int r = 0; r < rounds; ++r) {
    const double start = now();
    for (int i = 0; i < calls; ++i) FUNCTION(NAME)(input, output, memory);
    times[r] = (now() - start) / calls;
  }
  qsort(times, (size_t)rounds, sizeof *times, compare);
  printf("%.4f\n", times[rounds / 2]);
  free(times);
  return 0;
}
