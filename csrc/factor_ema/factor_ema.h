// factor_ema: the activation factor (1) and its matrix-free sibling (10). Equations are those of
// kbfgs_ext/ops/README.md. One entry of a list per layer.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/numbers.h"

namespace kbfgs {

// X~ = [X, 1] where n = cols + 1, else X.
template <typename T>
struct Rows {
  Numbers<T> X;    // m x cols, unit column stride
  int64_t m;
  int64_t cols;
  int64_t stride;  // of the rows
  int64_t n;       // cols or cols + 1
};

template <typename T>
struct FactorEma {
  T* A;      // n x n, symmetric, updated; or null
  T* a_bar;  // n, written
  Rows<T> rows;
};

template <typename T>
struct HessianAction {
  T* y;        // n, written
  Rows<T> rows;
  const T* s;  // n
  double lam;
};

// (1); where `ok` is false, or a layer's mean squares are not finite, A stays.
template <typename T>
void factor_ema(const std::vector<FactorEma<T>>& layers, double decay, bool ok);

// (10)
template <typename T>
void hessian_action(const std::vector<HessianAction<T>>& layers);

}  // namespace kbfgs
