// kron_precondition: momentum (2), direction (3), step (4), slope (13), change of the output (15).
// Equations are those of kbfgs_ext/ops/README.md. One entry of a list per layer; b and db are null without a bias.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/numbers.h"

namespace kbfgs {

template <typename T>
struct Parameters {
  int64_t n_g;
  int64_t d_in;  // n_a = d_in + 1 with a bias, else d_in
  Numbers<T> W;  // n_g x d_in, contiguous
  Numbers<T> b;  // n_g, or null
  bool bias() const { return b.data != nullptr; }
  int64_t n_a() const { return d_in + bias(); }
};

template <typename T>
struct Momentum {
  T* M;                    // n_g x n_a, updated
  Parameters<T> gradient;  // dW, db
  Parameters<T> weights;   // W, b; both read only
};

template <typename T>
struct Precondition {
  int64_t n_g;
  int64_t n_a;
  T* P;          // n_g x n_a, written
  const T* H_g;  // n_g x n_g, or null for the identity
  const T* M;    // n_g x n_a
  const T* H_a;  // n_a x n_a, or null for the identity
  T* work;       // n_g x n_a
  int64_t ld_P, ld_M, ld_work;  // row strides: a tile of larger matrices has theirs
  const T* left() const { return H_g == nullptr ? M : work; }  // of the right product
  int64_t ld_left() const { return H_g == nullptr ? ld_M : ld_work; }
  T* product() const { return H_a == nullptr ? P : work; }  // the left one
  int64_t ld_product() const { return H_a == nullptr ? ld_P : ld_work; }
};

template <typename T>
struct Descend {
  Parameters<T> weights;  // updated
  T* P;                   // n_g x n_a: the direction; afterwards [W, b] of before
  double step_size;
};

template <typename T>
struct Slope {
  T* slope;                // n_g, written
  Parameters<T> weights;   // read only
  const T* saved;          // n_g x n_a: [W, b] of before
  Parameters<T> gradient;  // dW, db
};

template <typename T>
struct OutputChange {
  T* change;              // n_g, written
  Parameters<T> weights;  // read only
  const T* saved;         // n_g x n_a: [W, b] of before
  const T* a_bar;         // n_a
  const T* a_bar_next;    // n_a
};

template <typename T>
struct KronStep {
  Momentum<T> momentum;
  Precondition<T> direction;
  Descend<T> descend;
};

template <typename T>
void momentum(const std::vector<Momentum<T>>& layers, double momentum, double weight_decay);

template <typename T>
void precondition(const std::vector<Precondition<T>>& layers);

// (4); where `ok` is false only P is written.
template <typename T>
void descend(const std::vector<Descend<T>>& layers, bool ok);

template <typename T>
void slope(const std::vector<Slope<T>>& layers);

template <typename T>
void output_change(const std::vector<OutputChange<T>>& layers);

// [W, b] = saved, which has the layout of P.
template <typename T>
void restore(const std::vector<Descend<T>>& layers);

template <typename T>
void kron_step(
    const std::vector<KronStep<T>>& layers, double momentum, double weight_decay, bool ok);

}  // namespace kbfgs
