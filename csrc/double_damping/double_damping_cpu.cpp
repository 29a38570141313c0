// Averaged pairs and their dampings.
//
// pair_ema: 5 n elements read, 2 n written. double_damping: one half of H read per product (see
// common/symv.h), a second product only for the layers where (7) changed y; 10 n for the vectors.
#include "double_damping.h"

#include <cmath>

#include "../common/parallel.h"
#include "../common/symv.h"
#include "../common/vector_ops.h"

namespace kbfgs {

namespace {

struct EmaBody {
  // x <- decay*x + (1 - decay)*(next - before), or times `next` where `before` is null; without
  // denormal numbers (which rounding would keep for ever where a unit is dead), stored if `write`;
  // *finite: whether all of it is.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      T* x, const T* before, const T* next, T decay, T rest, int64_t n, bool write, bool* finite) {
    using S = Simd<T, W>;
    typename S::V zero = {};  // a finite value times 0 is 0, every other is NaN
    int64_t i = 0;
    for (; i + S::L <= n; i += S::L) {
      typename S::V step = S::load(next + i);
      if (before != nullptr) step -= S::load(before + i);
      const typename S::V v = S::load(x + i) * decay + step * rest;
      zero += v * static_cast<T>(0);
      if (write) S::store(x + i, S::normal(v));
    }
    T total = S::sum(zero);
    for (; i < n; ++i) {
      const T step = before != nullptr ? next[i] - before[i] : next[i];
      const T v = decay * x[i] + rest * step;
      total += v * static_cast<T>(0);
      if (write) x[i] = normal(v);
    }
    *finite = total == static_cast<T>(0);
  }
};

}  // namespace

template <typename T>
void pair_ema(const PairEma<T>& p, double decay) {
  const T keep = static_cast<T>(decay), rest = static_cast<T>(1 - decay);
  const T* none = nullptr;
  bool s_finite, y_finite;
  vectorised<EmaBody>(p.s, none, p.h_change, keep, rest, p.n, false, &s_finite);
  vectorised<EmaBody>(p.y, p.g_bar, p.g_bar_next, keep, rest, p.n, false, &y_finite);
  if (!s_finite || !y_finite) return;
  vectorised<EmaBody>(p.s, none, p.h_change, keep, rest, p.n, true, &s_finite);  // (5)
  vectorised<EmaBody>(p.y, p.g_bar, p.g_bar_next, keep, rest, p.n, true, &y_finite);  // (5)
}

template <typename T>
bool damp(const DoubleDamping<T>& d, double mu1) {
  const double mu2 = static_cast<double>(static_cast<T>(d.lam));
  double sy = dot(d.s, d.y, d.n);
  const double yHy = dot(d.y, d.Hy, d.n);
  if (!(sy > mu1 * yHy)) {  // (6); also true for NaN, as in the reference
    const double theta = (1 - mu1) * yHy / (yHy - sy);
    axpby(d.s, static_cast<T>(theta), d.Hy, static_cast<T>(1 - theta), d.n);
    d.counts[kPowell] += 1;
    sy = dot(d.s, d.y, d.n);
  }
  const double ss = dot(d.s, d.s, d.n);
  if (sy > mu2 * ss) return false;
  const double theta = (1 - mu2) * ss / (ss - sy);  // (7)
  axpby(d.y, static_cast<T>(theta), d.s, static_cast<T>(1 - theta), d.n);
  d.counts[kLm] += 1;
  return true;
}

template <typename T>
void pair_ema(const std::vector<PairEma<T>>& layers, double decay) {
  int64_t elements = 0;
  for (const auto& p : layers) elements += 7 * p.n;
  parallel_units(static_cast<int64_t>(layers.size()), elements, [&](int64_t i) {
    pair_ema(layers[i], decay);
  });
}

template <typename T>
void double_damping(const std::vector<DoubleDamping<T>>& layers, double mu1, bool ok) {
  std::vector<Symv<T>> products;
  std::vector<int64_t> changed(layers.size(), 0);  // not bool: neighbours are written in parallel
  for (const auto& d : layers)
    if (d.H != nullptr) products.push_back({d.n, d.H, d.y, d.Hy});
  if (products.empty()) {  // the caller knows H y; all layers or none
    for (const auto& d : layers)
      if (ok) damp(d, mu1);
    return;
  }
  symv<T>(products, [&](int64_t i) { changed[i] = ok && damp(layers[i], mu1); });
  std::vector<Symv<T>> again;
  for (size_t i = 0; i < layers.size(); ++i)
    if (changed[i]) again.push_back(products[i]);
  if (!again.empty()) symv<T>(again, [](int64_t) {});
}

#define KBFGS_INSTANTIATE(T)                                   \
  template void pair_ema(const PairEma<T>&, double);           \
  template bool damp(const DoubleDamping<T>&, double);         \
  template void pair_ema(const std::vector<PairEma<T>>&, double); \
  template void double_damping(const std::vector<DoubleDamping<T>>&, double, bool);
KBFGS_INSTANTIATE(float)
KBFGS_INSTANTIATE(double)
#undef KBFGS_INSTANTIATE

}  // namespace kbfgs
