/* [[ name ]]: a network compiled by crossbit [[ version ]] for [[ manifest.target ]]. Generated: do not edit.

   A call needs no runtime library, allocates nothing, keeps no state and touches no file. Any number of threads may
   call at a time, each with a workspace of its own. Weights are constant data, shared by all of them. */
#ifndef [[ NAME ]]_H
#define [[ NAME ]]_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef CROSSBIT_TYPES
#define CROSSBIT_TYPES 1

/* What a call returns. Nothing is written unless it is CROSSBIT_OK. */
enum {
  CROSSBIT_OK = 0,
  CROSSBIT_NULL = -1,       /* a pointer is NULL */
  CROSSBIT_MISALIGNED = -2, /* a tensor off its type's alignment, or the workspace off its own */
  CROSSBIT_OVERLAP = -3,    /* an output or the workspace overlaps something else */
  CROSSBIT_WORKSPACE = -4,  /* the workspace is too small */
  CROSSBIT_INTERFACE = -5,  /* the app was compiled with the header of another library */
  CROSSBIT_CPU = -6,        /* this CPU lacks instructions of the library's target */
  CROSSBIT_POOL = -7        /* a pool without parallel_for, or with too many workers */
};

/* Threads that the app lends to a call. parallel_for calls work(context, begin, end, worker) for ranges that make up
   [0, count), with 0 <= worker < workers and never the same worker twice at a time, and returns when all are done. */
typedef struct crossbit_pool {
  void *self;
  int32_t workers;
  void (*parallel_for)(void *self, void (*work)(void *context, int32_t begin, int32_t end, int32_t worker),
                       void *context, int32_t count);
} crossbit_pool;

typedef struct crossbit_tensor {
  const char *name, *dtype, *layout; /* layout: the order of shape, row-major */
  int32_t rank, shape[4];
  size_t elements;
} crossbit_tensor;

typedef struct crossbit_layer {
  const char *name, *kind, *method; /* method: bits of weights and activations, '/M' where M filters share a scale */
  float bits_per_weight;            /* of what is stored, scales included */
} crossbit_layer;

typedef struct crossbit_model {
  const char *name, *version, *model_sha256, *target;
  uint32_t interface_id;
  int32_t workers; /* most threads that can share one call */
  size_t workspace_bytes, workspace_alignment, constant_bytes;
  int32_t inputs, outputs, layers;
  const crossbit_tensor *input, *output;
  const crossbit_layer *layer;
} crossbit_model;
#elif CROSSBIT_TYPES != 1
#error "[[ name ]].h and another header are of different versions of crossbit: compile both networks with one"
#endif

#define [[ NAME ]]_INTERFACE 0x[[ "%08x" % interface ]]u /* of this header and the library that belongs to it */
#define [[ NAME ]]_VERSION "[[ version ]]"
#define [[ NAME ]]_MODEL_SHA256 "[[ manifest.model_sha256 ]]"
#define [[ NAME ]]_TARGET "[[ manifest.target ]]"
#define [[ NAME ]]_WORKERS [[ manifest.threads ]]
#define [[ NAME ]]_WORKSPACE_BYTES [[ record.workspace_bytes ]]
#define [[ NAME ]]_WORKSPACE_ALIGNMENT [[ alignment ]]
#define [[ NAME ]]_CONSTANT_BYTES [[ record.constant_bytes ]]
{% for t in tensors %}

/* [[ t.role ]] [[ t.spec.name | quoted ]]: [[ t.spec.dtype ]] [[ t.spec.shape | list ]], [[ t.spec.layout ]], row-major, not quantised */
#define [[ NAME ]]_[[ t.id | upper ]]_ELEMENTS [[ t.tensor.elements ]]
#define [[ NAME ]]_[[ t.id | upper ]]_RANK [[ t.spec.shape | length ]]
#define [[ NAME ]]_[[ t.id | upper ]]_SHAPE {[[ t.spec.shape | join(", ") ]]}
{% endfor %}

/* The same for programs that look: sizes, shapes, and how every layer is quantised. */
extern const crossbit_model [[ name ]]_model;

/* What a status means, in a sentence. */
const char *[[ name ]]_strerror(int status);

/* Run once.

   interface_id: [[ NAME ]]_INTERFACE.
   workspace: [[ NAME ]]_WORKSPACE_BYTES bytes or more, [[ NAME ]]_WORKSPACE_ALIGNMENT-aligned; its content means nothing before and after.
   pool: threads to share the work, or NULL for none.
   Returns CROSSBIT_OK or what is wrong; tensors and workspace may not overlap, except inputs each other. */
int [[ name ]]_run_with(uint32_t interface_id, [[ declarations ]], void *workspace,
    size_t workspace_bytes, const crossbit_pool *pool);

/* Run once on this thread, in a workspace of [[ NAME ]]_WORKSPACE_BYTES. */
static inline int [[ name ]]_run([[ declarations ]], void *workspace) {
  return [[ name ]]_run_with([[ NAME ]]_INTERFACE, [[ arguments ]], workspace, [[ NAME ]]_WORKSPACE_BYTES, NULL);
}

#ifdef __cplusplus
}
#endif
#endif
