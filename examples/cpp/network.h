// A network compiled by crossbit, as a C++ class, and threads to lend to it.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "digits.h"

// Threads that share one call. One call at a time; another caller waits.
class Pool {
 public:
  // workers: with the thread that calls; DIGITS_WORKERS is the most that the network was compiled for.
  explicit Pool(int workers) : pool_{this, workers, parallel_for} {
    for (int worker = 1; worker < workers; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread &thread : threads_) thread.join();
  }

  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  const crossbit_pool *get() const { return &pool_; }

 private:
  using Work = void (*)(void *context, int32_t begin, int32_t end, int32_t worker);

  static void parallel_for(void *self, Work work, void *context, int32_t count) {
    static_cast<Pool *>(self)->run(work, context, count);
  }

  void run(Work work, void *context, int32_t count) {
    std::lock_guard turn(turn_);
    {
      std::lock_guard lock(mutex_);
      work_ = work, context_ = context, count_ = count;
      busy_ = static_cast<int>(threads_.size());
      ++job_;
    }
    start_.notify_all();
    share(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void serve(int worker) {
    for (long seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return stop_ || job_ != seen; });
        if (stop_) return;
        seen = job_;
      }
      share(worker);
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  // One worker's part of [0, count).
  void share(int worker) {
    const int64_t count = count_;
    const auto begin = static_cast<int32_t>(count * worker / pool_.workers);
    const auto end = static_cast<int32_t>(count * (worker + 1) / pool_.workers);
    if (begin < end) work_(context_, begin, end, worker);
  }

  crossbit_pool pool_;
  std::mutex turn_, mutex_;
  std::condition_variable start_, done_;
  Work work_ = nullptr;
  void *context_ = nullptr;
  int32_t count_ = 0;
  int busy_ = 0;
  long job_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;  // last: they use all of the above
};

// The network with a workspace: for one thread at a time. Weights are shared by all networks of a program.
class Network {
 public:
  using Image = std::array<float, DIGITS_X_ELEMENTS>;
  using Scores = std::array<float, DIGITS_Y_ELEMENTS>;

  // pool: threads that share each call, or none; it must outlive the network.
  explicit Network(const Pool *pool = nullptr) : pool_(pool ? pool->get() : nullptr) {}

  Scores run(const Image &image) {
    Scores scores;
    const int status = digits_run_with(DIGITS_INTERFACE, image.data(), scores.data(), workspace_->bytes,
                                       sizeof workspace_->bytes, pool_);
    if (status != CROSSBIT_OK) throw std::runtime_error(digits_strerror(status));
    return scores;
  }

  int label(const Image &image) {
    const Scores scores = run(image);
    return static_cast<int>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  }

 private:
  struct alignas(DIGITS_WORKSPACE_ALIGNMENT) Workspace {
    std::byte bytes[DIGITS_WORKSPACE_BYTES];
  };
  std::unique_ptr<Workspace> workspace_ = std::make_unique<Workspace>();
  const crossbit_pool *pool_;
};
