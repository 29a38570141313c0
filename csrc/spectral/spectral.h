// spectral: the polar factor of a direction, (16) to (19) of kbfgs_ext/ops/spectral/README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/gemm.h"

namespace kbfgs {

template <typename T>
struct Polar {
  int64_t n_g;
  int64_t n_a;
  T* P;     // n_g x n_a, replaced
  T* work;  // polar_workspace elements
  int64_t k() const { return std::min(n_g, n_a); }
};

// One iteration of (18): R = a*I + b*G + c*G^2.
struct Quintic {
  double a, b, c;
};

inline std::vector<Quintic> quintics(const std::vector<double>& coefficients) {
  std::vector<Quintic> found;
  for (size_t i = 0; i + 2 < coefficients.size(); i += 3)
    found.push_back({coefficients[i], coefficients[i + 1], coefficients[i + 2]});
  return found;
}

// (18'): Z = constant*I + sum of weights_i (G + shifts_i*I)^-1, at most kMostInverses of them.
struct Inverses {
  double constant;
  std::vector<double> weights, shifts;
};

constexpr size_t kMostInverses = 3;

// Elements of `work`, as in api.py: kSquares k x k matrices, P and P', with sides rounded up. The CPU
// uses P and four of the matrices; or kMostInverses of them, and half as much to invert them in.
constexpr int64_t kSquares = 5;
inline int64_t polar_workspace(int64_t n_g, int64_t n_a) {
  const int64_t k = rounded_up(std::min(n_g, n_a)), n = rounded_up(std::max(n_g, n_a));
  return k * (kSquares * k + 2 * n);
}

// Layers go one after the other: they may share `work`.
template <typename T>
void polar(
    const std::vector<Polar<T>>& layers, const std::vector<Quintic>& iterations, double ridge);

template <typename T>
void polar(const std::vector<Polar<T>>& layers, const Inverses& inverses, double ridge);

}  // namespace kbfgs
