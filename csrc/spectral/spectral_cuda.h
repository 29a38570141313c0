// spectral on CUDA: what stands between cuBLAS's products, each for all layers in one launch.
// Equations are those of kbfgs_ext/ops/spectral/README.md.
#pragma once

#include <cstdint>
#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct PolarLayer {
  const T* P;      // n_g x n_a
  T* X;            // n_g x n_a: P over its largest entry
  T *G, *B, *Z;    // k x k
  double* partial;  // polar_partials() numbers
  int n_g, n_a, k;
};

// Numbers of partial results per layer: of every block its largest entry, its squares, its trace.
int64_t polar_partials();

// X = P over its largest entry; NaN where one is not finite. Two launches.
template <typename T>
void scale_to_one(std::vector<PolarLayer<T>> layers, cudaStream_t stream);

// (17) in the place of G. Two launches.
template <typename T>
void normalise(std::vector<PolarLayer<T>> layers, double ridge, cudaStream_t stream);

// B = a*I + b*G + c*B, in units of 1/sqrt(norm) where `last`; with `first` Z too.
template <typename T>
void quintic(
    std::vector<PolarLayer<T>> layers, double a, double b, double c, double ridge, bool first,
    bool last, cudaStream_t stream);

}  // namespace kbfgs::cuda
