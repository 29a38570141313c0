// Work units over torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "stable.h"

namespace kbfgs {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Below this many elements read or written, waking another thread costs more than it gains: about
// 5 us of work on one core.
constexpr int64_t kGrainElements = 32 * 1024;

// Calls body(unit) once for every unit; `elements` is what all of them read or write. Threads take
// the next unit when they are free, so layers of any size balance; a unit must therefore own what it
// writes, which also makes every result independent of the number of threads.
template <class Body>
void parallel_units(int64_t units, int64_t elements, const Body& body) {
  const int64_t threads =
      std::min({units, thread_count(), elements / kGrainElements + 1});
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(unit);
  };
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, worker);
  else
    worker(0, 1);
}

}  // namespace kbfgs
