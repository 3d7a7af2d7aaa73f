// A network that crossbit compiled, on the TVM runtime: the artifact's model.so behind one class.
//
//   crossbit::Network network("runs/m16/lib");           // one VM
//   crossbit::Network second = network.another();        // a VM for a second thread, on the same library
//   network.run(input, input_size, output, output_size);
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "manifest.h"

namespace crossbit {

namespace ffi = tvm::ffi;

// Compiled kernels load vectors from multiples of 64 bytes; from anywhere else they crash, and nothing checks it.
struct AlignedMemory {
  void AllocData(DLTensor* tensor) {
    const std::size_t bytes = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, bytes);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// One virtual machine on a loaded library. Not for two threads at once: a VM keeps the values of the call it is in.
// Every thread takes its own by another(), which costs no second copy of code or weights.
class Network {
 public:
  // Throws std::runtime_error: no model.so in the folder, another one than this program was built for, or a CPU
  // without the instructions it was compiled for.
  explicit Network(const std::filesystem::path& folder) : Network(load(folder)) {}

  Network(Network&&) = default;
  Network& operator=(Network&&) = default;
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  Network another() const { return Network(library_); }

  static constexpr std::size_t input_size() { return product(manifest::kInputShape); }
  static constexpr std::size_t output_size() { return product(manifest::kOutputShape); }

  // Floats in the manifest's shapes, row-major, at any address: they are copied to aligned memory.
  // Throws std::invalid_argument for a wrong size, std::runtime_error for what TVM reports.
  void run(const float* input, std::size_t inputs, float* output, std::size_t outputs) {
    if (inputs != input_size() || outputs != output_size()) {
      throw std::invalid_argument("the network takes " + std::to_string(input_size()) + " floats and gives " +
                                  std::to_string(output_size()) + ", called with " + std::to_string(inputs) + " and " +
                                  std::to_string(outputs));
    }
    std::memcpy(input_.data_ptr(), input, inputs * sizeof(float));
    const ffi::Tensor result = checked([&] {
      // TVM's thread pool belongs to the calling thread. Code for one thread never asks for it.
      if (manifest::kThreads > 1) configure_(kAllCores, manifest::kThreads);
      return main_(input_).template cast<ffi::Tensor>();
    });
    if (static_cast<std::size_t>(result.numel()) != outputs) throw std::runtime_error("model.so is another network's");
    std::memcpy(output, result.data_ptr(), outputs * sizeof(float));
  }

 private:
  // Of TVM's enumerations.
  static constexpr int kAllCores = 1;
  static constexpr int kPooledAllocator = 2;

  explicit Network(ffi::Module library)
      : library_(std::move(library)),
        machine_(checked([&] {
          ffi::Module vm = function(library_, "vm_load_executable")().cast<ffi::Module>();
          constexpr int kFirst = 0;
          function(vm, "vm_initialization")(static_cast<int>(kDLCPU), kFirst, kPooledAllocator);
          return vm;
        })),
        main_(checked([&] { return function(machine_, "main"); })),
        configure_(checked([] { return ffi::Function::GetGlobalRequired("runtime.config_threadpool"); })),
        input_(ffi::Tensor::FromNDAlloc(
            AlignedMemory(), ffi::ShapeView(manifest::kInputShape.data(), manifest::kInputShape.size()),
            DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0})) {}

  static ffi::Module load(const std::filesystem::path& folder) {
    const std::string path = (folder / "model.so").string();
    std::error_code error;
    const std::uintmax_t bytes = std::filesystem::file_size(path, error);
    if (error) throw std::runtime_error(path + ": " + error.message());
    if (bytes != manifest::kLibraryBytes) {
      throw std::runtime_error(path + ": " + std::to_string(bytes) + " bytes, this program was built for one of " +
                               std::to_string(manifest::kLibraryBytes) + "; build it again with -DARTIFACT=");
    }
    check_cpu(path);
    return checked([&] { return ffi::Module::LoadFromFile(path); });
  }

  // The first processor's line of flags, 'flags' on x86 and 'Features' on ARM, holds every feature.
  static void check_cpu(const std::string& path) {
    std::ifstream cpuinfo("/proc/cpuinfo");
    std::set<std::string> flags;
    for (std::string line; flags.empty() && std::getline(cpuinfo, line);) {
      if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
      std::istringstream words(line);
      for (std::string word; words >> word;) flags.insert(word);
    }
    for (const char* feature : manifest::kFeatures) {
      if (flags.count(feature) == 0) throw std::runtime_error(path + ": this CPU lacks " + feature);
    }
  }

  static ffi::Function function(const ffi::Module& module, const char* name) {
    ffi::Optional<ffi::Function> found = module->GetFunction(name);
    if (!found.has_value()) throw std::runtime_error(std::string("model.so has no function ") + name);
    return found.value();
  }

  // TVM's errors as std::runtime_error, without the stack trace.
  template <typename Call>
  static auto checked(Call&& call) -> decltype(call()) {
    try {
      return call();
    } catch (const ffi::Error& error) {
      throw std::runtime_error(std::string(error.kind()) + ": " + std::string(error.message()));
    }
  }

  template <typename Shape>
  static constexpr std::size_t product(const Shape& shape) {
    std::size_t size = 1;
    for (std::int64_t length : shape) size *= static_cast<std::size_t>(length);
    return size;
  }

  ffi::Module library_;
  ffi::Module machine_;
  ffi::Function main_;
  ffi::Function configure_;
  ffi::Tensor input_;
};

}  // namespace crossbit
