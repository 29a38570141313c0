// lbfgs_two_loop: the limited-memory inverse factor applied (11), and its ring of pairs. Equations
// are those of kbfgs_ext/ops/README.md. One entry of a list per layer.
#pragma once

#include <cstdint>
#include <vector>

namespace kbfgs {

template <typename T>
struct Ring {
  int64_t n;
  int64_t p;
  int64_t pushed;  // pairs accepted so far; the newest is in row (pushed - 1) % p
  const T* S;      // p x n, contiguous
  const T* Y;      // p x n, contiguous
  const T* rho;    // p

  int64_t filled() const { return pushed < p ? pushed : p; }
  // The row of the pair of age k, 0 being the oldest.
  int64_t row(int64_t k) const { return (pushed - filled() + k) % p; }
};

template <typename T>
struct TwoLoop {
  Ring<T> ring;
  int64_t columns;
  T* out;            // n x columns, contiguous, written
  const T* Q;        // n x columns
  int64_t Q_stride;  // of Q's rows; its columns have unit stride
};

enum class Form { automatic, recursion, compact };

template <typename T>
void two_loop(const std::vector<TwoLoop<T>>& layers, Form form);

// Both forms, each for the layers that it is given.
template <typename T>
void compact(const std::vector<TwoLoop<T>>& layers);
template <typename T>
void recursion(const std::vector<TwoLoop<T>>& layers);

template <typename T>
struct Push {
  int64_t n;
  int64_t p;
  T* S;             // p x n, one row written where the pair passes the gate (8)
  T* Y;             // p x n
  T* rho;           // p
  int64_t* pushed;  // scalar
  int64_t* counts;
  const T* s;
  const T* y;
  const T* c;       // n, reference vector of the gate
};

template <typename T>
void push(const std::vector<Push<T>>& layers);

}  // namespace kbfgs
