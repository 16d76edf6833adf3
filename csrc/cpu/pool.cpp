// The threads that the ops run on.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace svdk {
namespace {

using Clock = std::chrono::steady_clock;
// How long a thread looks out before it sleeps: about what waking it costs.
constexpr std::chrono::microseconds kLookOut{30};

template <typename Test>
bool spin_until(const Test& test) {
  const Clock::time_point end = Clock::now() + kLookOut;
  do {
    for (int i = 0; i < 64; ++i) {
      if (test()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (Clock::now() < end);
  return false;
}

// One call. Helpers that come late find nothing left to claim, and may outlive the call.
struct Job {
  const std::function<void(int64_t)>* task;
  int64_t count;
  std::atomic<int> places;  // for helpers
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::exception_ptr error;

  Job(const std::function<void(int64_t)>& t, int64_t n, int helpers)
      : task(&t), count(n), places(helpers) {}

  bool complete() const { return done.load(std::memory_order_acquire) == count; }

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        (*task)(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    if (!spin_until([this] { return complete(); })) {
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [this] { return complete(); });
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (error) std::rethrow_exception(error);
  }
};

class Pool {
 public:
  void run(int64_t count, int helpers, const std::function<void(int64_t)>& task) {
    const auto job = std::make_shared<Job>(task, count, helpers);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = job;
      posted_.fetch_add(1, std::memory_order_release);
    }
    if (helpers < threads_) {
      for (int i = 0; i < helpers; ++i) wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    job->work();
    job->wait();
  }

  std::mutex& in_use() { return in_use_; }

 private:
  // Where no thread can be had (out of memory, over a limit) those that are there, or the caller
  // alone, do the work; the next call tries again.
  void grow(int helpers) {
    try {
      for (; threads_ < helpers; ++threads_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      const auto news = [&] { return posted_.load(std::memory_order_acquire) != seen; };
      spin_until(news);
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, news);
        seen = posted_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job->places.fetch_sub(1, std::memory_order_relaxed) > 0) job->work();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> posted_{0};
  int threads_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A child process has none of them and
// gets a pool of its own.
Pool* the_pool = nullptr;

Pool& pool() {
  static const bool once = [] {
    the_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
    return true;
  }();
  (void)once;
  return *the_pool;
}

}  // namespace

void run_in_pool(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int helpers = static_cast<int>(count < threads ? count : threads) - 1;
  if (helpers > 0) {
    std::unique_lock<std::mutex> mine(pool().in_use(), std::try_to_lock);
    if (mine.owns_lock()) return pool().run(count, helpers, task);
  }
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace svdk
