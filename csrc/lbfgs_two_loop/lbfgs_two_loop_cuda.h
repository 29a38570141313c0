// lbfgs_two_loop on CUDA: layer tables and launchers. S, Y, rho are contiguous, Q and out have unit
// column stride. Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

template <typename T>
struct RingLayer {
  T* out;        // n x columns, rows ld_out apart
  const T* Q;    // n x columns, rows ld apart
  const T* S;    // p x n
  const T* Y;    // p x n
  const T* rho;  // p
  const int64_t* pushed;
  int64_t ld, ld_out;
  int n, columns, p;
  int blocks_before;  // the launcher sets it
};

template <typename T>
struct PushLayer {
  T *S, *Y;         // p x n each
  T* rho;           // p
  int64_t* pushed;
  int64_t* counts;  // 4
  const T *s, *y;   // n each
  const T* c;       // n
  int n, p;
};

// Whether the recursion's kernel can take a layer of this size; else the compact form must.
bool two_loop_fits(int64_t n, int64_t columns, int64_t p, int64_t element_bytes);

// The recursion (11).
template <typename T>
void two_loop(std::vector<RingLayer<T>> layers, cudaStream_t stream);

// A pair into each ring if it passes the gate (8).
template <typename T>
void push(std::vector<PushLayer<T>> layers, const bool* ok, cudaStream_t stream);

}  // namespace kbfgs::cuda
