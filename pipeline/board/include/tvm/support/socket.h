// TCP sockets of Linux.
#ifndef TVM_SUPPORT_SOCKET_H_
#define TVM_SUPPORT_SOCKET_H_

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <tvm/ffi/error.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace tvm {
namespace support {

/*! \brief A host and a port; `known()` where the host's name has an address. */
class SockAddr {
 public:
  SockAddr(const char* host, int port) : text_(std::string(host) + ":" + std::to_string(port)) {
    addrinfo wanted{}, *found = nullptr;
    wanted.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host, std::to_string(port).c_str(), &wanted, &found) == 0) {
      size_ = found->ai_addrlen;
      std::memcpy(&address_, found->ai_addr, size_);
      freeaddrinfo(found);
    }
  }
  bool known() const { return size_ > 0; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address_); }
  socklen_t size() const { return size_; }
  int ss_family() const { return address_.ss_family; }
  std::string AsString() const { return text_; }

 private:
  sockaddr_storage address_{};
  socklen_t size_ = 0;
  std::string text_;
};

class Socket {
 public:
  static void Error(const char* where) { TVM_FFI_THROW(InternalError) << where << ": " << strerror(errno); }
};

/*! \brief A descriptor; copies are the same socket, and whoever is last to need it closes it. */
class TCPSocket : public Socket {
 public:
  using SockType = int;
  TCPSocket() = default;
  explicit TCPSocket(SockType descriptor) : descriptor_(descriptor) { NoDelay(); }

  void Create(int family = AF_INET) {
    descriptor_ = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    NoDelay();
  }
  bool Connect(const SockAddr& address) { return connect(descriptor_, address.get(), address.size()) == 0; }
  bool BadSocket() const { return descriptor_ < 0; }
  void Close() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
  }
  ssize_t Send(const void* data, size_t size) {
    return Again([&] { return send(descriptor_, data, size, MSG_NOSIGNAL); });
  }
  ssize_t Recv(void* data, size_t size) {
    return Again([&] { return recv(descriptor_, data, size, 0); });
  }
  /*! \brief All of it, or as much as there was before the end or an error. */
  size_t SendAll(const void* data, size_t size) {
    return All(size, [&](size_t done) { return Send(static_cast<const char*>(data) + done, size - done); });
  }
  size_t RecvAll(void* data, size_t size) {
    return All(size, [&](size_t done) { return Recv(static_cast<char*>(data) + done, size - done); });
  }
  SockType descriptor() const { return descriptor_; }

 private:
  // Requests are small and each waits for its answer.
  void NoDelay() {
    int one = 1;
    setsockopt(descriptor_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  }
  template <typename Call>
  static ssize_t Again(Call call) {
    ssize_t result;
    do {
      result = call();
    } while (result < 0 && errno == EINTR);
    return result;
  }
  template <typename Call>
  static size_t All(size_t size, Call call) {
    size_t done = 0;
    while (done < size) {
      ssize_t moved = call(done);
      if (moved <= 0) break;
      done += moved;
    }
    return done;
  }

  SockType descriptor_ = -1;
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_SOCKET_H_
