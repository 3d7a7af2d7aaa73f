// A queue of bytes between a socket and the RPC protocol. Not a ring: what was read is dropped when all of it was, or
// when more room is needed.
#ifndef TVM_SUPPORT_RING_BUFFER_H_
#define TVM_SUPPORT_RING_BUFFER_H_

#include <algorithm>
#include <cstring>
#include <vector>

namespace tvm {
namespace support {

class RingBuffer {
 public:
  size_t bytes_available() const { return bytes_.size() - begin_; }

  void Reserve(size_t size) {
    Drop();
    bytes_.reserve(size);
  }
  void Write(const void* data, size_t size) {
    const char* chars = static_cast<const char*>(data);
    bytes_.insert(bytes_.end(), chars, chars + size);
  }
  void Read(void* data, size_t size) {
    std::memcpy(data, bytes_.data() + begin_, size);
    Advance(size);
  }
  /*! \brief Let `send(data, size)` take up to `size` bytes; it returns how many it took. */
  template <typename Send>
  size_t ReadWithCallback(Send send, size_t size) {
    size_t sent = send(bytes_.data() + begin_, std::min(size, bytes_available()));
    Advance(sent);
    return sent;
  }
  /*! \brief Let `receive(data, size)` bring up to `size` bytes; it returns how many it brought. */
  template <typename Receive>
  size_t WriteWithCallback(Receive receive, size_t size) {
    size_t end = bytes_.size();
    bytes_.resize(end + size);
    size_t received = receive(bytes_.data() + end, size);
    bytes_.resize(end + received);
    return received;
  }

 private:
  void Advance(size_t size) {
    begin_ += size;
    if (begin_ == bytes_.size()) Drop();
  }
  void Drop() {
    bytes_.erase(bytes_.begin(), bytes_.begin() + begin_);
    begin_ = 0;
  }

  std::vector<char> bytes_;
  size_t begin_ = 0;
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_RING_BUFFER_H_
