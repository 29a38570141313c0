// The sizes of the layers' steps (23) from the lengths of their directions, in double. Equations are
// those of kbfgs_ext/ops/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace kbfgs {

template <typename T>
struct Lengths {
  double* sizes;        // n, written
  const T* norms;       // n
  const double* roots;  // n: of the rows
  const double* step_size;
  int64_t n;  // layers
};

// The length of a direction that still is one; a NaN stays.
KBFGS_HOST_DEVICE inline double length_of(double norm) {
  constexpr double kShortest = 1e-20;
  return norm < kShortest ? kShortest : norm;
}

template <typename T>
KBFGS_HOST_DEVICE inline double size_of(const Lengths<T>& l, int64_t i, double size) {
  return size * l.roots[i] / length_of(l.norms[i]);
}

}  // namespace kbfgs
