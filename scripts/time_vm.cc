// time_vm ROUNDS CALLS LIBRARY EXTENT...: the median over rounds of the microseconds of a call of a network on TVM's
// runtime; the extents are the input's shape. With ROUNDS 0, one call, and the peak resident bytes.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct AlignedMemory {
  void AllocData(DLTensor* t) { t->data = std::aligned_alloc(64, (ffi::GetDataSize(*t) + 63) / 64 * 64); }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

int main(int count, char** arguments) {
  if (count < 5) return 2;
  const int rounds = std::atoi(arguments[1]), calls = std::atoi(arguments[2]);
  std::vector<int64_t> shape;
  for (int i = 4; i < count; ++i) shape.push_back(std::atoi(arguments[i]));
  ffi::Module library = ffi::Module::LoadFromFile(arguments[3]);
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2 /* pooled memory */);
  ffi::Function run = machine->GetFunction("main").value();
  ffi::Tensor input = ffi::Tensor::FromNDAlloc(AlignedMemory(), ffi::ShapeView(shape.data(), shape.size()),
                                               DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  float* values = static_cast<float*>(input.data_ptr());
  for (int64_t i = 0; i < input.numel(); ++i) values[i] = static_cast<float>(i * 37 % 64) / 32 - 1;
  run(input);
  if (rounds == 0) {
    std::ifstream status("/proc/self/status");
    std::string word;
    while (status >> word && word != "VmHWM:") {
    }
    long kilobytes = -1;
    status >> kilobytes;
    std::printf("%ld\n", kilobytes * 1024);
    return 0;
  }
  std::vector<double> times;
  for (int r = 0; r < rounds; ++r) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) run(input);
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls);
  }
  std::sort(times.begin(), times.end());
  std::printf("%.4f\n", times[times.size() / 2]);
}
