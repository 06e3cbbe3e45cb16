// Tasks on torch's own threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace normdrop {

// Calls run(worker, i) for every task i, each once, on torch's own threads. Which worker takes
// which task is open: what tasks compute must not depend on it.
template <class Run>
void parallel_workers(int64_t workers, int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) {
      run(worker, i);
    }
  });
}

// The same without the worker's number; with one thread where it is not worth more.
template <class Run>
void parallel_tasks(int64_t tasks, int64_t elements, const Run& run) {
  constexpr int64_t worthwhile = 32768;
  const int64_t threads = elements < worthwhile ? 1 : torch::stable::get_num_threads();
  const int64_t workers = std::min(tasks, threads);
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) {
      run(i);
    }
    return;
  }
  parallel_workers(workers, tasks, [&](int64_t, int64_t i) { run(i); });
}

// Calls run(begin, end) for consecutive ranges of the tasks, the same thread having the same range
// each time: so that it finds in its cache what it left there.
template <class Run>
void parallel_ranges(int64_t tasks, int64_t elements, const Run& run) {
  constexpr int64_t worthwhile = 32768;
  if (elements < worthwhile || tasks <= 1) {
    run(int64_t{0}, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, 1, run);
  }
}

}  // namespace normdrop
