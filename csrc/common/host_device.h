// Functions that the CPU and a GPU share.
#pragma once

#ifdef __CUDACC__
#define KBFGS_HOST_DEVICE __host__ __device__
#else
#define KBFGS_HOST_DEVICE
#endif

namespace kbfgs {

KBFGS_HOST_DEVICE inline bool is_finite(double x) {
  return x - x == 0;  // Inf - Inf and NaN - NaN are NaN
}

}  // namespace kbfgs
