// double_damping on CUDA: layer tables and launchers. Vectors have unit stride, matrices are
// contiguous. Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct PairLayer {
  T *s, *y;                 // n each, updated
  const T* h_change;        // n
  const T *g_bar, *g_next;  // n each
  int n;
};

template <typename T>
struct DampingLayer {
  T *s, *y;         // n each, damped
  T* Hy;            // n: written where H is given, else read
  const T* H;       // n x n, symmetric, or null
  int64_t* counts;  // 4
  const double* lam;
  int n;
};

// (5); a layer whose new pair is not finite keeps the old one.
template <typename T>
void pair_ema(
    std::vector<PairLayer<T>> layers, double decay, const bool* ok, cudaStream_t stream);

// (6), (7); with H before and after it one launch more for H y.
template <typename T>
void double_damping(
    std::vector<DampingLayer<T>> layers, double mu1, const bool* ok, cudaStream_t stream);

}  // namespace kbfgs::cuda
