// TVM puts tensors into JSON with these; a board reads and writes no such JSON, so they refuse.
#ifndef TVM_SUPPORT_BASE64_H_
#define TVM_SUPPORT_BASE64_H_

#include <tvm/ffi/error.h>
#include <tvm/support/io.h>

namespace tvm {
namespace support {

class Base64Stream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit Base64Stream(Stream*) { TVM_FFI_THROW(RuntimeError) << "this server cannot put tensors into JSON"; }

  size_t Read(void*, size_t) final { return 0; }
  size_t Write(const void*, size_t) final { return 0; }
  void Finish() {}
  void InitPosition() {}
};

using Base64InStream = Base64Stream;
using Base64OutStream = Base64Stream;

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_BASE64_H_
