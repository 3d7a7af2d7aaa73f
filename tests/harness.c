/* Runs a network as an app does: harness IN OUT SHIFT WORKERS CALLERS REPEATS.
 *
 * IN holds the inputs of CALLERS threads one after the other, OUT gets their outputs. Every thread calls REPEATS times in
 * a workspace of its own, filled with NaN before each call. Tensors begin SHIFT floats behind a multiple of 64 bytes.
 * WORKERS > 0 lends all callers one pool. Status: 0, a status of the library (its negative), 100: it wrote outside of its
 * memory, 101: two calls gave different outputs, 102: a file, 103: a pool used wrongly.
 *
 * app.h, written by c_apps.py, names the library: RUN, MODEL, INPUTS, OUTPUTS and the sizes from the header's macros. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "app.h"

enum { MOST_CALLERS = 16, MOST_WORKERS = 16, GUARD = 256, NAN_BYTE = 0xff, CHUNKS = 3 };

typedef struct job {
  void (*work)(void *, int32_t, int32_t, int32_t);
  void *context;
  int32_t count, worker, workers;
} job;

static atomic_int pool_calls, misuse;

/* Several ranges a worker, the last ones short or empty. */
static void *worker_main(void *data) {
  const job *j = data;
  int32_t size = j->count / (CHUNKS * j->workers) + 1;
  for (int32_t begin = j->worker * size; begin < j->count; begin += j->workers * size) {
    int32_t end = begin + size < j->count ? begin + size : j->count;
    j->work(j->context, begin, end, j->worker);
  }
  return 0;
}

/* The self of the pool is the number of its workers. */
static void parallel_for(void *self, void (*work)(void *, int32_t, int32_t, int32_t), void *context, int32_t count) {
  int32_t workers = *(int32_t *)self;
  pthread_t threads[MOST_WORKERS];
  job jobs[MOST_WORKERS];
  atomic_fetch_add(&pool_calls, 1);
  if (count < 1) atomic_store(&misuse, 1);
  for (int32_t i = 0; i < workers; i++) {
    jobs[i] = (job){work, context, count, i, workers};
    if (i && pthread_create(&threads[i], 0, worker_main, &jobs[i])) abort();
  }
  worker_main(&jobs[0]);
  for (int32_t i = 1; i < workers; i++) pthread_join(threads[i], 0);
}

typedef struct caller {
  float *inputs[INPUTS], *outputs[OUTPUTS], *first[OUTPUTS];
  const crossbit_pool *pool;
  int repeats, status;
} caller;

static int shift;

/* Guarded memory: bytes of 0xff before and behind. */
static char *guarded(size_t bytes, size_t offset) {
  char *memory = 0;
  if (posix_memalign((void **)&memory, 64, 2 * GUARD + bytes + 64)) abort();
  memset(memory, NAN_BYTE, 2 * GUARD + bytes + 64);
  return memory + GUARD + offset;
}

static int untouched(const char *tensor, size_t bytes) {
  for (int i = 1; i <= GUARD; i++)
    if ((unsigned char)tensor[-i] != NAN_BYTE) return 0;
  for (size_t i = 0; i < GUARD; i++)
    if ((unsigned char)tensor[bytes + i] != NAN_BYTE) return 0;
  return 1;
}

static void *caller_main(void *data) {
  caller *c = data;
  char *workspace = guarded(WORKSPACE_BYTES, 0);
#ifdef UNDEFINED_WORKSPACE /* so that valgrind sees what is read and was never written */
  free(workspace - GUARD);
  if (posix_memalign((void **)&workspace, 64, 2 * GUARD + WORKSPACE_BYTES)) abort();
  workspace += GUARD;
#endif
  for (int repeat = 0; repeat < c->repeats && !c->status; repeat++) {
#ifndef UNDEFINED_WORKSPACE
    memset(workspace, NAN_BYTE, WORKSPACE_BYTES);
#endif
    for (int i = 0; i < OUTPUTS; i++) memset(c->outputs[i], NAN_BYTE, output_elements[i] * sizeof(float));
    c->status = RUN(c->inputs, c->outputs, workspace, c->pool);
    if (c->status) break;
#ifndef UNDEFINED_WORKSPACE
    if (!untouched(workspace, WORKSPACE_BYTES)) c->status = 100;
#endif
    for (int i = 0; i < OUTPUTS; i++) {
      size_t bytes = output_elements[i] * sizeof(float);
      if (!untouched((char *)c->outputs[i], bytes)) c->status = 100;
      if (!repeat)
        memcpy(c->first[i], c->outputs[i], bytes);
      else if (memcmp(c->first[i], c->outputs[i], bytes))
        c->status = 101;
    }
  }
  free(workspace - GUARD);
  return 0;
}

int main(int count, char **args) {
  static caller callers[MOST_CALLERS];
  pthread_t threads[MOST_CALLERS];
  if (count != 7) return 102;
  int32_t workers = atoi(args[4]);
  int number = atoi(args[5]), status = 0;
  const crossbit_pool pool = {&workers, workers, parallel_for};
  shift = atoi(args[3]);
  FILE *in = fopen(args[1], "rb");
  if (!in || number > MOST_CALLERS || workers > MOST_WORKERS) return 102;
  for (int n = 0; n < number; n++) {
    caller *c = &callers[n];
    c->pool = workers ? &pool : 0;
    c->repeats = atoi(args[6]);
    for (int i = 0; i < INPUTS; i++) {
      c->inputs[i] = (float *)guarded(input_elements[i] * sizeof(float), sizeof(float) * (size_t)shift);
      if (fread(c->inputs[i], sizeof(float), input_elements[i], in) != input_elements[i]) return 102;
    }
    for (int i = 0; i < OUTPUTS; i++) {
      c->outputs[i] = (float *)guarded(output_elements[i] * sizeof(float), sizeof(float) * (size_t)shift);
      c->first[i] = (float *)guarded(output_elements[i] * sizeof(float), 0);
    }
  }
  if (fgetc(in) != EOF) return 102;
  fclose(in);
  for (int n = 1; n < number; n++)
    if (pthread_create(&threads[n], 0, caller_main, &callers[n])) abort();
  caller_main(&callers[0]);
  for (int n = 1; n < number; n++) pthread_join(threads[n], 0);

  FILE *out = fopen(args[2], "wb");
  if (!out) return 102;
  for (int n = 0; n < number; n++) {
    if (callers[n].status) {
      status = callers[n].status;
      fprintf(stderr, "%s\n", MODEL_STRERROR(status));
    }
    for (int i = 0; i < INPUTS; i++)
      if (MODEL.input[i].elements != input_elements[i]) status = 102;
    for (int i = 0; i < OUTPUTS; i++) {
      if (MODEL.output[i].elements != output_elements[i]) status = 102;
      fwrite(callers[n].first[i], sizeof(float), output_elements[i], out);
      free((char *)callers[n].first[i] - GUARD);
      free((char *)callers[n].outputs[i] - GUARD - sizeof(float) * (size_t)shift);
    }
    for (int i = 0; i < INPUTS; i++) free((char *)callers[n].inputs[i] - GUARD - sizeof(float) * (size_t)shift);
  }
  fclose(out);
  printf("%d\n", atomic_load(&pool_calls));
  return atomic_load(&misuse) ? 103 : status < 0 ? -status : status;
}
