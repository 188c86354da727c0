// A small pool of threads. Work is cut into pieces that do not depend on the number of threads, and no piece shares
// sums with another: so results are the same bytes on any machine that runs the same instruction set.
#pragma once

#include <cstdint>

namespace spaceport {

class ThreadPool {
 public:
  // n_threads counts the calling thread; 0 takes every core the process may use.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const;

  // Calls function(context, piece) for every piece in [0, n_pieces), in any order, and returns when all are done.
  void run(int64_t n_pieces, void (*function)(void* context, int64_t piece), void* context);

 private:
  struct State;
  State* state_;
};

template <class Function>
void parallel_for(ThreadPool& pool, int64_t n_pieces, Function&& function) {
  auto call = [](void* context, int64_t piece) { (*static_cast<Function*>(context))(piece); };
  pool.run(n_pieces, call, &function);
}

// [begin, end) of the rows of a piece, when n rows are cut into pieces of `size`.
struct Range {
  int64_t begin, end;
};
inline int64_t n_pieces_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}
inline Range range_of(int64_t piece, int64_t n, int64_t size) {
  const int64_t begin = piece * size;
  return {begin, begin + size < n ? begin + size : n};
}

}  // namespace spaceport
