// restart: the layers of (12), the same for the CPU and CUDA. Equations are those of
// kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>

#include "../common/numbers.h"

namespace kbfgs {

template <typename T>
struct Restart {
  T* H;                   // n x n, or null (and n = 0): then `pushed`
  int64_t* pushed;        // scalar
  int64_t* marks;         // accepted and rejected where the streak began, restarts
  const int64_t* counts;  // 4
  const bool* force;      // null: no
  const double* lam;      // null: H <- I
  const T* A;             // n x n, or null: then X
  Numbers<T> X;           // m x d_in, rows ld apart; n is d_in or d_in + 1
  int64_t n, m, d_in, ld;
};

}  // namespace kbfgs
