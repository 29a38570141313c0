// The gated rank-2 update of inverse factors, and the curvature update of all layers.
//
// bfgs_update per layer: n^2/2 elements read for H y, then n^2 read and n^2 written for (9);
// 2 n^2 + 4 n^2 FLOPs. curvature_update adds n_a^2/2 of H_a and n_a^2/2 of A (or X once) on the
// activation side, and on the gradient side n_g^2/2 where (7) changed y.
#include "bfgs_update.h"

#include <algorithm>
#include <cmath>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/symv.h"
#include "../common/vector_ops.h"

namespace kbfgs {

namespace {

constexpr double kCurvatureGate = 1e-4;  // of (8), relative to s's*||c||: the authors' value

// (9) as H_ij + (s_i*w_j + w_i*s_j) with w = coefficient/2*s - rho*Hy. The two products are rounded
// before they are added: the sum is then the same for (i, j) and (j, i), and H stays symmetric to the
// last bit. Every row is read and written from left to right: computing one half and storing it
// twice took 3.6 times as long on a matrix from memory (AMD Zen 4, 1001 x 1001 floats).
struct Rank2Body {
  template <int W, typename T>
  static KBFGS_INLINE void run(
      T* H, int64_t n, int64_t begin, int64_t end, const T* s, const T* w) {
    using S = Simd<T, W>;
    for (int64_t i = begin; i < end; ++i) {
      T* h = H + i * n;
      const typename S::V s_i = S::all(s[i]), w_i = S::all(w[i]);
      int64_t j = 0;
      for (; j + S::L <= n; j += S::L) {
        typename S::V p = s_i * S::load(w + j), q = w_i * S::load(s + j);
        rounded(p);
        rounded(q);
        S::store(h + j, S::load(h + j) + (p + q));
      }
      for (; j < n; ++j) {
        T p = s[i] * w[j], q = w[i] * s[j];
        rounded(p);
        rounded(q);
        h[j] += p + q;
      }
    }
  }
};

// (9) for every layer whose pair was accepted.
template <typename T>
void rank2(const std::vector<BfgsUpdate<T>>& layers, const std::vector<Gate<T>>& gates) {
  struct Block {
    size_t layer;
    int64_t begin, end;
  };
  std::vector<Block> blocks;
  int64_t elements = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BfgsUpdate<T>& b = layers[i];
    if (!gates[i].accept) continue;
    elements += b.n * b.n;
    std::copy(b.Hy, b.Hy + b.n, b.w);
    axpby(b.w, static_cast<T>(-gates[i].rho), b.s, static_cast<T>(gates[i].coefficient / 2), b.n);
    const int64_t rows = kGrainElements / std::max<int64_t>(1, b.n) + 1;
    for (int64_t row = 0; row < b.n; row += rows)
      blocks.push_back({i, row, std::min(row + rows, b.n)});
  }
  parallel_units(static_cast<int64_t>(blocks.size()), elements, [&](int64_t unit) {
    const BfgsUpdate<T>& b = layers[blocks[unit].layer];
    vectorised<Rank2Body>(
        b.H, b.n, blocks[unit].begin, blocks[unit].end, b.s, static_cast<const T*>(b.w));
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
  bool sound = std::isfinite(rho);
  T coefficient = 0;
  // Finite products imply finite vectors: 0 times Inf or NaN is NaN.
  if (Hy != nullptr) {
    const T yHy = static_cast<T>(dot(y, Hy, n));
    coefficient = rho * rho * yHy + rho;
    sound = sound && yHy >= 0 && std::isfinite(coefficient * ss) &&
            std::isfinite(rho * static_cast<T>(dot(Hy, Hy, n)));
  } else {
    sound = sound && std::isfinite(ss) && std::isfinite(static_cast<T>(dot(y, y, n)));
  }
  const T c_norm = static_cast<T>(norm(c, n));
  const bool accept = sound && sy > 0 && sy > static_cast<T>(kCurvatureGate) * ss * c_norm;
  return {accept, static_cast<double>(rho), static_cast<double>(coefficient)};
}

template <typename T>
void bfgs_update(const std::vector<BfgsUpdate<T>>& layers, bool Hy_given) {
  std::vector<Gate<T>> gates(layers.size());
  if (Hy_given) {
    for (size_t i = 0; i < layers.size(); ++i) gates[i] = decide(layers[i]);
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
    if (!all_finite(p.h_change, p.n) || !all_finite(p.g_bar, p.n) ||
        !all_finite(p.g_bar_next, p.n))
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
