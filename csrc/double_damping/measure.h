// The scales of relative dampings (21), (22): the same scalars on the CPU and on a GPU, in double.
// Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace kbfgs {

template <typename T>
struct MeasureInputs {
  double* v;      // moving average of the mean square
  double* lam_a;  // written
  const T* norm;  // of X
  const double* damping;
  double elements;  // of X
};

template <typename T>
struct MeasurePair {
  double *ss, *yy;      // moving averages of squared changes
  T *g_bar, *g_next;    // n each, put in units of s
  const T* h_change;    // n
  int n;
};

// A moving average that begins with the first value that is finite and not 0.
KBFGS_HOST_DEVICE inline double followed(double old, double next, double share) {
  if (!is_finite(next)) return old;
  return old > 0 ? old + share * (next - old) : next;
}

// (21)
template <typename T>
KBFGS_HOST_DEVICE inline void measure_inputs(const MeasureInputs<T>& l, double share) {
  const double norm = *l.norm;
  const double v = followed(*l.v, norm * norm / l.elements, share);
  *l.v = v;
  *l.lam_a = (v > 0 ? v : 1.0) * *l.damping;
}

// (22): what gradients are multiplied by.
KBFGS_HOST_DEVICE inline double unit(double ss, double yy) {
  return ss > 0 && yy > 0 ? sqrt(ss / yy) : 1.0;
}

}  // namespace kbfgs
