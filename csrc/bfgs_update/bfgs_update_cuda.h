// bfgs_update on CUDA: layer tables and launchers. Matrices are contiguous, vectors have unit stride;
// no alignment beyond the element's is assumed. Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <vector>

#include "restart.h"

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct BfgsLayer {
  T* H;            // n x n, symmetric, updated
  const T* s;      // n
  const T* y;      // n
  T* Hy;           // n: H y, given or written
  const T* c;      // n, reference vector of the gate
  int64_t* counts; // 4
  int n;
  int64_t before;  // elements of the layers before; the launcher sets it
};

// (8), (9); without `Hy_given` a first launch writes Hy.
template <typename T>
void bfgs_update(
    std::vector<BfgsLayer<T>> layers, bool Hy_given, const bool* ok, cudaStream_t stream);

// Elements of `fresh` per layer.
inline int64_t fresh_elements(int64_t n_g) { return 3 * n_g + 1; }

template <typename T>
struct CurvatureLayer {
  // Activation side; n_a = 0 without.
  T* H_a;             // n_a x n_a, updated
  const T* A;         // n_a x n_a, or null: then X
  Numbers<T> X;       // m x d_in, rows ld apart
  const T* a_bar;     // n_a
  T* work_a;          // 3 n_a: s, y, H y
  T* z;               // m: X~ s
  int64_t* counts_a;  // 4
  const double* lam_a;
  int n_a, m, d_in;
  int64_t ld;
  // Gradient side; n_g = 0 without.
  T* H_g;                    // n_g x n_g, updated
  T *s, *y;                  // n_g each: the averages, updated
  const T* h_change;         // n_g
  const T *g_bar, *g_next;   // n_g each
  T* fresh;                  // 3 n_g + 1: s and y averaged, H y, and whether the means are finite
  T* work_g;                 // 3 n_g: s and y damped, H y of the damped y
  int64_t* counts_g;         // 4
  const double* lam_g;
  int n_g;
  // Set by the launcher: elements of the factors, elements of X and column tiles that come before.
  int64_t before_a, before_g, before_x;
  int tiles_before;
  T inverse_m;  // 1/m
};

// Steps 6 to 9 of the algorithm for all layers; all have an activation side or none, likewise the
// gradient side.
template <typename T>
void curvature_update(
    std::vector<CurvatureLayer<T>> layers, double pair_decay, double mu1, const bool* ok,
    const bool* ok_pair, cudaStream_t stream);

// (12) after `after` rejected pairs in a row, or where `force`, which may be null.
template <typename T>
void restart(
    std::vector<Restart<T>> layers, int64_t after, cudaStream_t stream);

}  // namespace kbfgs::cuda
