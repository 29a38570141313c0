// The gated rank-2 update of inverse factors, and the curvature update of all layers.
//
// bfgs_update per layer: n^2/2 elements read for H y, then n^2/2 read and n^2 written for (9);
// 2 n^2 + 2 n^2 FLOPs. curvature_update adds n_a^2/2 of H_a and n_a^2/2 of A (or X once) on the
// activation side, and on the gradient side n_g^2/2 where (7) changed y.
#include "bfgs_update.h"

#include <algorithm>
#include <cmath>

#include "../common/parallel.h"
#include "../common/symmetric_tiles.h"
#include "../common/symv.h"
#include "../common/vector_ops.h"

namespace kbfgs {

namespace {

constexpr double kCurvatureGate = 1e-4;  // of (8), relative to s's*||c||: the authors' value

// H <- H + left_i*s_j + right_i*Hy_j with left = coefficient*s - rho*Hy and right = -rho*s: (9).
template <typename T>
struct Rank2 {
  const T* s;
  const T* Hy;
  T rho;
  T coefficient;

  template <int W>
  KBFGS_INLINE typename Simd<T, W>::V row(int64_t i, int64_t j, typename Simd<T, W>::V h) const {
    using S = Simd<T, W>;
    return (h + S::load(s + j) * left(i)) + S::load(Hy + j) * right(i);
  }
  KBFGS_INLINE T entry(int64_t i, int64_t j, T h) const {
    return (h + s[j] * left(i)) + Hy[j] * right(i);
  }
  KBFGS_INLINE T left(int64_t i) const { return coefficient * s[i] - rho * Hy[i]; }
  KBFGS_INLINE T right(int64_t i) const { return -rho * s[i]; }
};

struct Rank2Body {
  template <int W, typename T>
  static KBFGS_INLINE void run(
      T* H, int64_t n, int64_t begin, int64_t end, const Rank2<T>* update) {
    symmetric_tiles<W>(H, n, n, begin, end, *update);
  }
};

// (9) for every layer whose pair was accepted.
template <typename T>
void rank2(const std::vector<BfgsUpdate<T>>& layers, const std::vector<Gate<T>>& gates) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < layers.size(); ++i)
    if (gates[i].accept) append_panels(panels, static_cast<int64_t>(i), layers[i].n);
  parallel_units(static_cast<int64_t>(panels.size()), [&](int64_t unit) {
    const Panel& panel = panels[unit];
    const BfgsUpdate<T>& b = layers[panel.task];
    const Gate<T>& g = gates[panel.task];
    const Rank2<T> update{b.s, b.Hy, static_cast<T>(g.rho), static_cast<T>(g.coefficient)};
    vectorised<Rank2Body>(b.H, b.n, panel.begin, panel.end, &update);
  });
}

template <typename T>
Gate<T> decide(const BfgsUpdate<T>& b) {
  const Gate<T> g = gate(b.n, b.s, b.y, static_cast<const T*>(b.Hy), b.c);
  b.counts[g.accept ? kAccepted : kRejected] += 1;
  return g;
}

}  // namespace

template <typename T>
Gate<T> gate(int64_t n, const T* s, const T* y, const T* Hy, const T* c) {
  // Rounded to T where the reference rounds, so that both overflow in the same place.
  const T sy = static_cast<T>(dot(s, y, n)), ss = static_cast<T>(dot(s, s, n));
  const T rho = 1 / sy;
  bool finite = std::isfinite(rho);
  T coefficient = 0;
  // Finite products imply finite vectors: 0 times Inf or NaN is NaN.
  if (Hy != nullptr) {
    coefficient = rho * rho * static_cast<T>(dot(y, Hy, n)) + rho;
    finite = finite && std::isfinite(coefficient * ss) &&
             std::isfinite(rho * static_cast<T>(dot(Hy, Hy, n)));
  } else {
    finite = finite && std::isfinite(ss) && std::isfinite(static_cast<T>(dot(y, y, n)));
  }
  const T c_norm = static_cast<T>(norm(c, n));
  const bool accept = finite && sy > 0 && sy > static_cast<T>(kCurvatureGate) * ss * c_norm;
  return {accept, static_cast<double>(rho), static_cast<double>(coefficient)};
}

template <typename T>
void bfgs_update(const std::vector<BfgsUpdate<T>>& layers, bool Hy_given) {
  std::vector<Gate<T>> gates(layers.size());
  if (Hy_given) {
    parallel_units(
        static_cast<int64_t>(layers.size()), [&](int64_t i) { gates[i] = decide(layers[i]); });
  } else {
    std::vector<Symv<T>> products;
    for (const auto& b : layers) products.push_back({b.n, b.H, b.y, b.Hy});
    symv<T>(products, [&](int64_t i) { gates[i] = decide(layers[i]); });
  }
  rank2(layers, gates);
}

template <typename T>
void curvature_update(
    const std::vector<CurvatureA<T>>& a_side, const std::vector<CurvatureG<T>>& g_side,
    double pair_decay, double mu1, bool ok, bool ok_pair) {
  const int64_t n_a = ok ? static_cast<int64_t>(a_side.size()) : 0;
  const int64_t n_g = ok_pair ? static_cast<int64_t>(g_side.size()) : 0;
  // Both sides go through the phases together: a phase is one parallel region over all layers.
  std::vector<BfgsUpdate<T>> updates;
  std::vector<Gate<T>> gates;
  std::vector<Symv<T>> first;  // s = H_a a_bar and Hy = H_g y
  for (int64_t i = 0; i < n_a; ++i) {
    const BfgsUpdate<T>& b = a_side[i].update;
    updates.push_back(b);
    first.push_back({b.n, b.H, b.c, a_side[i].s});
  }
  std::vector<const CurvatureG<T>*> live;
  for (int64_t i = 0; i < n_g; ++i) {
    const PairEma<T>& p = g_side[i].pair;
    if (!all_finite(p.h_bar, p.n) || !all_finite(p.h_bar_next, p.n) ||
        !all_finite(p.g_bar, p.n) || !all_finite(p.g_bar_next, p.n))
      continue;  // this layer's second pass is void
    pair_ema(p, pair_decay);
    const DoubleDamping<T>& d = g_side[i].damping;
    std::copy(p.s, p.s + p.n, d.s);  // only copies are damped
    std::copy(p.y, p.y + p.n, d.y);
    live.push_back(&g_side[i]);
    updates.push_back(g_side[i].update);
    first.push_back({d.n, d.H, d.y, d.Hy});
  }
  gates.resize(updates.size());
  std::vector<int64_t> changed(live.size(), 0);
  symv<T>(first, [&](int64_t t) {
    if (t < n_a) return;
    changed[t - n_a] = damp(live[t - n_a]->damping, mu1);
    if (!changed[t - n_a]) gates[t] = decide(updates[t]);
  });

  std::vector<Symv<T>> second;  // y = A s and, where (7) changed y, Hy = H_g y again
  std::vector<int64_t> owner;
  std::vector<HessianAction<T>> actions;
  for (int64_t i = 0; i < n_a; ++i) {
    const CurvatureA<T>& a = a_side[i];
    if (a.A == nullptr) {
      actions.push_back(a.action);
      continue;
    }
    second.push_back({a.update.n, a.A, a.s, a.y});
    owner.push_back(i);
  }
  for (size_t k = 0; k < live.size(); ++k) {
    if (!changed[k]) continue;
    second.push_back(first[n_a + k]);
    owner.push_back(n_a + static_cast<int64_t>(k));
  }
  symv<T>(second, [&](int64_t t) {
    const int64_t i = owner[t];
    if (i < n_a)
      axpby(a_side[i].y, T{1}, a_side[i].s, static_cast<T>(a_side[i].lam), updates[i].n);
    else
      gates[i] = decide(updates[i]);
  });
  hessian_action(actions);

  std::vector<Symv<T>> third;  // Hy = H_a y
  for (int64_t i = 0; i < n_a; ++i)
    third.push_back({updates[i].n, updates[i].H, updates[i].y, updates[i].Hy});
  symv<T>(third, [&](int64_t i) { gates[i] = decide(updates[i]); });
  rank2(updates, gates);
}

#define KBFGS_INSTANTIATE(T)                                                               \
  template Gate<T> gate(int64_t, const T*, const T*, const T*, const T*);                  \
  template void bfgs_update(const std::vector<BfgsUpdate<T>>&, bool);                      \
  template void curvature_update(                                                          \
      const std::vector<CurvatureA<T>>&, const std::vector<CurvatureG<T>>&, double, double, \
      bool, bool);
KBFGS_INSTANTIATE(float)
KBFGS_INSTANTIATE(double)
#undef KBFGS_INSTANTIATE

}  // namespace kbfgs
