// y = H x for symmetric matrices of several layers at once; each upper triangle is read once.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace kbfgs {

template <typename T>
struct Symv {
  int64_t n;
  const T* H;  // n x n, contiguous, symmetric; only j >= i is read
  const T* x;  // n
  T* y;        // n, written
};

// Rows [begin, end) of one task's matrix.
struct Panel {
  int64_t task;
  int64_t begin;
  int64_t end;
};

// Cuts the upper triangle of an n x n matrix into row panels of about equal area and appends them;
// every panel begins at a multiple of 16.
// The cut depends on n alone, so sums over panels do not depend on the number of threads.
void append_panels(std::vector<Panel>& panels, int64_t task, int64_t n);

// Runs all products; done(task) is called once a task's y is complete, on the thread that
// completed it.
template <typename T>
void symv(const std::vector<Symv<T>>& tasks, const std::function<void(int64_t)>& done);

}  // namespace kbfgs
