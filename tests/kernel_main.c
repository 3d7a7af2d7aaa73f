/* Calls the TVM kernel that it is linked with: program FILE,CODE,BITS,EXTENT,EXTENT,... for each array, the last one the
 * result, which is written back to its file. CODE and BITS are DLPack's data type. Status 1: the kernel refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_ARRAYS = 16, MOST_AXES = 8 };

int __tvm_ffi_main(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
}

/* TVM's runtime sets these pointers of a library when it loads it. */
static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  void *memory = 0;
  return posix_memalign(&memory, 64, bytes) ? 0 : memory;
}

static int release(int type, int id, void *memory) {
  (void)type, (void)id;
  free(memory);
  return 0;
}

void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;

int main(int count, char **specs) {
  static TVMFFIAny arguments[MOST_ARRAYS];
  static DLTensor arrays[MOST_ARRAYS];
  static int64_t shapes[MOST_ARRAYS][MOST_AXES];
  size_t bytes = 0;
  const char *path = 0;
  for (int i = 0; i < count - 1; i++) {
    DLTensor *array = &arrays[i];
    path = strtok(specs[i + 1], ",");
    array->dtype.code = (uint8_t)atoi(strtok(0, ","));
    array->dtype.bits = (uint8_t)atoi(strtok(0, ","));
    array->dtype.lanes = 1;
    array->device.device_type = kDLCPU;
    array->shape = shapes[i];
    bytes = array->dtype.bits / 8;
    for (char *extent = strtok(0, ","); extent; extent = strtok(0, ",")) {
      shapes[i][array->ndim] = atoi(extent);
      bytes *= (size_t)shapes[i][array->ndim++];
    }
    if (posix_memalign(&array->data, 64, bytes)) return 2;
    FILE *file = fopen(path, "rb");
    if (!file || fread(array->data, 1, bytes, file) != bytes || fclose(file)) return 2;
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = array;
  }
  TVMFFIAny nothing = {0};
  if (__tvm_ffi_main(0, arguments, count - 1, &nothing)) return 1;
  FILE *file = fopen(path, "wb");
  return !file || fwrite(arrays[count - 2].data, 1, bytes, file) != bytes || fclose(file) ? 2 : 0;
}
