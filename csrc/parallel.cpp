#include "parallel.h"

#include <sched.h>
#include <unistd.h>
#include <exception>
#include <utility>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace spaceport {

namespace {

int n_usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

}  // namespace

struct ThreadPool::State {
  std::mutex entrance;  // one run at a time; a second caller works alone
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::thread> threads;
  pid_t owner = getpid();  // threads do not survive a fork

  uint64_t round = 0;
  bool stopping = false;
  int n_working = 0;
  int64_t n_pieces = 0;
  std::atomic<int64_t> next{0};
  void (*function)(void*, int64_t) = nullptr;
  void* context = nullptr;

  std::exception_ptr failure;  // the first of a run, for its caller

  void work() {
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < n_pieces;) {
      try {
        function(context, piece);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return stopping || round != seen; });
        if (stopping) return;
        seen = round;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex);
      if (--n_working == 0) done.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int n_threads) : state_(new State) {
  if (n_threads <= 0) n_threads = n_usable_cores();
  for (int i = 1; i < n_threads; ++i) state_->threads.emplace_back([this] { state_->serve(); });
}

ThreadPool::~ThreadPool() {
  if (getpid() != state_->owner) return;  // a forked child: the threads, and with them the locks, are not there
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wake.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
  delete state_;
}

int ThreadPool::n_threads() const {
  return int(state_->threads.size()) + 1;
}

void ThreadPool::run(int64_t n_pieces, void (*function)(void*, int64_t), void* context) {
  State& s = *state_;
  const bool alone = n_pieces < 2 || s.threads.empty() || getpid() != s.owner || !s.entrance.try_lock();
  if (alone) {
    for (int64_t piece = 0; piece < n_pieces; ++piece) function(context, piece);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.function = function;
    s.context = context;
    s.n_pieces = n_pieces;
    s.next.store(0, std::memory_order_relaxed);
    s.n_working = int(s.threads.size());
    ++s.round;
  }
  s.wake.notify_all();
  s.work();
  {
    std::unique_lock<std::mutex> lock(s.mutex);
    s.done.wait(lock, [&] { return s.n_working == 0; });
  }
  const std::exception_ptr failure = std::exchange(s.failure, nullptr);
  s.entrance.unlock();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace spaceport
