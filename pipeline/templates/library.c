/* [[ name ]]: a network compiled by crossbit [[ version ]] for [[ manifest.target ]]. Generated: do not edit. */
{% if kernels %}
#if defined(__FAST_MATH__)
#error "-ffast-math changes results: compile [[ name ]].c without it"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

{% endif %}
#include "[[ name ]].h"

#include <math.h>
#include <stdbool.h>
#include <string.h>
{% if cpu == "hwcap" %}
#include <sys/auxv.h>
{% endif %}

#if defined(__GNUC__)
#define CROSSBIT_ALIGNED __attribute__((aligned([[ alignment ]])))
#define CROSSBIT_KERNEL __attribute__((noinline)) /* the workspace holds other types in every kernel */
#define CROSSBIT_PUBLIC __attribute__((visibility("default")))
#else
#define CROSSBIT_ALIGNED
#define CROSSBIT_KERNEL
#define CROSSBIT_PUBLIC
#endif
{% if "crossbit_popcount(" in kernels %}

static inline uint32_t crossbit_popcount(uint32_t x) {
#if defined(__GNUC__) && (defined(__POPCNT__) || defined(__ARM_NEON) || defined(__wasm__))
  return (uint32_t)__builtin_popcount(x);
#else
  x -= (x >> 1) & 0x55555555u;
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  return (((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
#endif
}
{% endif %}
{% for dtype, type in scalar_types %}
{% if "crossbit_min_%s(" % dtype in kernels %}

static inline [[ type ]] crossbit_min_[[ dtype ]]([[ type ]] a, [[ type ]] b) { return a < b ? a : b; }
{% endif %}
{% if "crossbit_max_%s(" % dtype in kernels %}

static inline [[ type ]] crossbit_max_[[ dtype ]]([[ type ]] a, [[ type ]] b) { return a > b ? a : b; }
{% endif %}
{% endfor %}

[[ constants ]]
{% if kernels %}
[[ kernels ]]
{% else %}
{% for symbol, signature in signatures.items() %}
int32_t [[ symbol ]]([[ signature | join(", ") ]]);
{% endfor %}
{% endif %}
{% for symbol, fields in parallel.items() %}

struct [[ symbol ]]_arguments {
{% for field in fields %}
  [[ field ]];
{% endfor %}
};

static void [[ symbol ]]_range(void *context, int32_t begin, int32_t end, int32_t worker) {
  const struct [[ symbol ]]_arguments *a = (const struct [[ symbol ]]_arguments *)context;
  [[ symbol ]]({% for _ in fields %}a->p[[ loop.index0 ]], {% endfor %}begin, end, worker);
}
{% endfor %}
{% if parallel %}

static void share(const crossbit_pool *pool, void (*work)(void *, int32_t, int32_t, int32_t), void *context, int32_t count) {
  if (pool)
    pool->parallel_for(pool->self, work, context, count);
  else
    work(context, 0, count, 0);
}
{% endif %}

static const crossbit_tensor inputs[] = {
{% for t in tensors if t.role == "input" %}
  {[[ t.spec.name | quoted ]], "[[ t.spec.dtype ]]", "[[ t.spec.layout ]]", [[ t.spec.shape | length ]], {[[ t.spec.shape | join(", ") ]]}, [[ t.tensor.elements ]]},
{% endfor %}
};

static const crossbit_tensor outputs[] = {
{% for t in tensors if t.role == "output" %}
  {[[ t.spec.name | quoted ]], "[[ t.spec.dtype ]]", "[[ t.spec.layout ]]", [[ t.spec.shape | length ]], {[[ t.spec.shape | join(", ") ]]}, [[ t.tensor.elements ]]},
{% endfor %}
};

static const crossbit_layer layers[] = {
{% for layer in manifest.layers %}
  {[[ layer.name | quoted ]], [[ layer.operator | quoted ]], [[ layer.method | quoted ]], [[ "%.6ff" % layer.bits_per_weight ]]},
{% else %}
  {"", "", "", 0.0f},
{% endfor %}
};

CROSSBIT_PUBLIC const crossbit_model [[ name ]]_model = {
  "[[ name ]]", [[ NAME ]]_VERSION, [[ NAME ]]_MODEL_SHA256, [[ NAME ]]_TARGET, [[ NAME ]]_INTERFACE, [[ NAME ]]_WORKERS,
  [[ NAME ]]_WORKSPACE_BYTES, [[ NAME ]]_WORKSPACE_ALIGNMENT, [[ NAME ]]_CONSTANT_BYTES,
  [[ tensors | selectattr("role", "eq", "input") | list | length ]], [[ tensors | selectattr("role", "eq", "output") | list | length ]], [[ manifest.layers | length ]],
  inputs, outputs, layers,
};

CROSSBIT_PUBLIC const char *[[ name ]]_strerror(int status) {
  switch (status) {
    case CROSSBIT_OK: return "done";
    case CROSSBIT_NULL: return "a pointer is NULL";
    case CROSSBIT_MISALIGNED: return "a tensor is not aligned to 4 bytes, or the workspace not to [[ alignment ]]";
    case CROSSBIT_OVERLAP: return "an output or the workspace overlaps another tensor";
    case CROSSBIT_WORKSPACE: return "the workspace is smaller than [[ record.workspace_bytes ]] bytes";
    case CROSSBIT_INTERFACE: return "the app was compiled with the header of another library: compile it with this [[ name ]].h";
    case CROSSBIT_CPU: return "this CPU lacks instructions that [[ manifest.target ]] has: compile the network for a target of this CPU";
    case CROSSBIT_POOL: return "the pool has no parallel_for, or not 1 to [[ manifest.threads ]] workers";
    default: return "no status of [[ name ]]";
  }
}
{% if cpu %}

static bool supported(void) {
{% if cpu == "builtin" %}
  return {% for f in features %}__builtin_cpu_supports("[[ f ]]")[[ " && " if not loop.last ]]{% endfor %};
{% else %}
  return (getauxval(AT_HWCAP) & [[ features ]]) == [[ features ]];
{% endif %}
}
{% endif %}

/* Whether two ranges of memory have no byte in common. */
static bool apart(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
  const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
  return x < y ? y - x >= a_bytes : x - y >= b_bytes;
}

CROSSBIT_PUBLIC int [[ name ]]_run_with(uint32_t interface_id, [[ declarations ]], void *workspace,
    size_t workspace_bytes, const crossbit_pool *pool) {
  char *const memory = (char *)workspace;
  if (interface_id != [[ NAME ]]_INTERFACE) return CROSSBIT_INTERFACE;
  if ({% for t in tensors %}![[ t.id ]] || {% endfor %}!workspace) return CROSSBIT_NULL;
  if ({% for t in tensors %}(uintptr_t)[[ t.id ]] % sizeof *[[ t.id ]] || {% endfor %}(uintptr_t)workspace % [[ NAME ]]_WORKSPACE_ALIGNMENT)
    return CROSSBIT_MISALIGNED;
  if (workspace_bytes < [[ NAME ]]_WORKSPACE_BYTES) return CROSSBIT_WORKSPACE;
{% for a, b in pairs %}
  if (!apart([[ a ]], [[ b ]])) return CROSSBIT_OVERLAP;
{% endfor %}
  if (pool && (!pool->parallel_for || pool->workers < 1 || pool->workers > [[ NAME ]]_WORKERS)) return CROSSBIT_POOL;
{% if cpu %}
  if (!supported()) return CROSSBIT_CPU;
{% endif %}
{% for line in calls %}
  [[ line ]]
{% endfor %}
  return CROSSBIT_OK;
}
