// factor_ema on CUDA: layer tables and launchers. X has unit column stride, A is contiguous.
// Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/numbers.h"

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct FactorLayer {
  T* A;        // n_a x n_a, updated, or null: a_bar alone
  T* a_bar;    // n_a, written
  Numbers<T> X;  // m x d_in, rows ld apart
  int64_t ld;
  int m, d_in, n_a;
  // Set by the launcher: column tiles and tiles of A that come before.
  int columns_before, tiles_before;
};

template <typename T>
struct ActionLayer {
  T* y;        // n_a, written
  Numbers<T> X;  // m x d_in, rows ld apart
  const T* s;  // n_a
  T* z;        // m, scratch
  const double* lam;
  int64_t ld;
  int m, d_in, n_a;
  // Set by the launcher: elements of X and column tiles that come before; 1/m.
  int64_t before;
  int columns_before;
  T inverse_m;
};

// Elements of `spoiled` that a layer needs: one per 32 columns.
inline int64_t spoiled_elements(int64_t n_a) { return (n_a + 31) / 32; }

// (1). `spoiled`: scratch, the sum of the layers' spoiled_elements.
template <typename T>
void factor_ema(
    std::vector<FactorLayer<T>> layers, double decay, const bool* ok, int* spoiled,
    cudaStream_t stream);

// (10) without A.
template <typename T>
void hessian_action(std::vector<ActionLayer<T>> layers, cudaStream_t stream);

}  // namespace kbfgs::cuda
