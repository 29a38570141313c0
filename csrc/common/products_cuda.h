// Products of symmetric matrices with vectors, for all layers in one launch.
#pragma once

#include <cstdint>
#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct Product {
  const T* H;  // n x n, contiguous
  const T* v;  // n
  T* out;      // n, not v
  int n;
  int64_t before;  // elements of the matrices before; the launcher sets it
};

// out = H v
template <typename T>
void multiply(std::vector<Product<T>> products, cudaStream_t stream);

}  // namespace kbfgs::cuda
