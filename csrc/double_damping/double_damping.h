// double_damping: the averaged pair (5) and its two dampings (6), (7). Equations are those of
// kbfgs_ext/ops/README.md. One entry of a list per layer.
#pragma once

#include <cstdint>
#include <vector>

namespace kbfgs {

enum Count { kAccepted, kRejected, kPowell, kLm };  // columns of `counts`

template <typename T>
struct PairEma {
  int64_t n;
  T* s;  // n, updated
  T* y;  // n, updated
  const T* h_change;
  const T* g_bar;
  const T* g_bar_next;
};

template <typename T>
struct DoubleDamping {
  int64_t n;
  T* s;          // n, damped
  T* y;          // n, damped
  T* Hy;         // n, written where H is given, else read
  const T* H;    // n x n, symmetric, or null
  int64_t* counts;
  double lam;    // mu2
};

// (5); a layer whose new pair is not finite keeps the old one.
template <typename T>
void pair_ema(const PairEma<T>& layer, double decay);

// (6), (7) on s and y with Hy = H y known. Whether y changed, so that Hy is no longer H y.
template <typename T>
bool damp(const DoubleDamping<T>& layer, double mu1);

template <typename T>
void pair_ema(const std::vector<PairEma<T>>& layers, double decay);

template <typename T>
void double_damping(const std::vector<DoubleDamping<T>>& layers, double mu1, bool ok);

}  // namespace kbfgs
