// kron_precondition on CUDA: layer tables and launchers. All tensors are contiguous; b and db are null
// without a bias. Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/numbers.h"
#include "lengths.h"

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

namespace kbfgs::cuda {

// Parameters and gradients of a layer in their own types: T, or 16-bit ones.
template <typename E, typename G>
struct Typed {
  E *W, *b;
  const G *dW, *db;
};

template <typename T>
struct ParameterLayer {
  T* joined;           // n_g x n_a: M, P, or (only read) what descend saved
  Numbers<T> W, b;     // n_g x d_in, n_g
  Numbers<T> dW, db;
  const double* step_size;
  const T *a_bar, *a_bar_next;  // n_a
  T* row_sums;     // n_g: the slope, or the change of the output
  int n_g, d_in, n_a;
  int64_t before;  // elements of `joined` before; the launcher sets it

  template <class Run>
  KBFGS_ANYWHERE void visit(const Run& run) const {
    W.visit([&](auto* weights) {
      using E = std::remove_pointer_t<decltype(weights)>;
      run(Typed<E, E>{weights, static_cast<E*>(b.data), nullptr, nullptr});
    });
  }
  template <class Run>
  KBFGS_ANYWHERE void visit_with_gradient(const Run& run) const {
    visit([&](const auto& own) {
      using E = std::remove_pointer_t<decltype(own.W)>;
      dW.visit([&](const auto* gradient) {
        using G = std::remove_const_t<std::remove_pointer_t<decltype(gradient)>>;
        run(Typed<E, G>{own.W, own.b, gradient, static_cast<const G*>(db.data)});
      });
    });
  }
};

template <typename T>
struct SmallLayer {
  T* P;            // n_g x n_a, written: the direction; with W, the parameters of before
  const T* H_g;    // n_g x n_g, symmetric, or null: the identity
  const T* M;      // n_g x n_a
  const T* H_a;    // n_a x n_a, symmetric, or null: the identity
  Numbers<T> W, b;  // null: the direction alone
  const double* step_size;
  int n_g, d_in, n_a;
  int blocks_before;  // the launcher sets it
};

// (2): M is `joined`.
template <typename T>
void momentum(
    std::vector<ParameterLayer<T>> layers, double momentum, double weight_decay, const bool* ok,
    cudaStream_t stream);

// (4): `joined` is P, afterwards [W, b] of before.
template <typename T>
void descend(std::vector<ParameterLayer<T>> layers, const bool* ok, cudaStream_t stream);

// (13): `row_sums` written; `joined` is [W, b] of before.
template <typename T>
void slope(std::vector<ParameterLayer<T>> layers, cudaStream_t stream);

// (15): `row_sums` written; `joined` is [W, b] of before.
template <typename T>
void output_change(std::vector<ParameterLayer<T>> layers, cudaStream_t stream);

// [W, b] <- `joined` where *undo.
template <typename T>
void restore(std::vector<ParameterLayer<T>> layers, const bool* undo, cudaStream_t stream);

// (23), one launch for all entries.
template <typename T>
void lengths(std::vector<Lengths<T>> entries, bool shared, cudaStream_t stream);

// Whether a layer is small enough for small_step.
bool small_step_fits(int64_t n_g, int64_t n_a, int64_t element_bytes);

// (3), and (4) where W is given, for small layers.
template <typename T>
void small_step(std::vector<SmallLayer<T>> layers, const bool* ok, cudaStream_t stream);

}  // namespace kbfgs::cuda
