// Memory of one RPC request, freed all at once.
#ifndef TVM_SUPPORT_ARENA_H_
#define TVM_SUPPORT_ARENA_H_

#include <memory>
#include <new>
#include <vector>

namespace tvm {
namespace support {

class Arena {
 public:
  /*! \brief Uninitialised room for `count` of T, a type without a destructor. */
  template <typename T>
  T* allocate_(int count = 1) {
    blocks_.emplace_back(new char[sizeof(T) * count]);  // new aligns for every type that is used here
    return reinterpret_cast<T*>(blocks_.back().get());
  }
  void RecycleAll() { blocks_.clear(); }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_ARENA_H_
