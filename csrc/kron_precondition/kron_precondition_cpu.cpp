// Momentum, the direction P = H_g M H_a, and the step.
//
// Per layer, N = n_g*n_a: momentum reads 3N elements and writes N; the two products are
// 2*N*(n_g + n_a) FLOPs; the step reads 2N and writes 2N; the slope reads 3N, the change of the
// output 2N. Nothing else is touched.
#include "kron_precondition.h"

#include <algorithm>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/pieces.h"
#include "../common/simd.h"
#include "../common/vector_ops.h"
#include "panels.h"

namespace kbfgs {

namespace {

struct MomentumBody {
  // M <- mu*M + (1-mu)*(dW + gamma*W). Where a gradient has become 0 for good (a unit is dead), M
  // would end at numbers that rounding keeps denormal for ever, and H_g M H_a multiplies them all.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      T* M, const T* dW, const T* weight, int64_t n, T mu, T rest, T gamma) {
    using S = Simd<T, W>;
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) {
      const typename S::V D = S::load(dW + j) + S::load(weight + j) * gamma;
      S::store(M + j, S::normal(S::load(M + j) * mu + D * rest));
    }
    for (; j < n; ++j) M[j] = normal(mu * M[j] + rest * (dW[j] + gamma * weight[j]));
  }
};

struct DescendBody {
  // weight, P <- weight - step*P, weight
  template <int W, typename T>
  static KBFGS_INLINE void run(T* weight, T* P, int64_t n, T step) {
    using S = Simd<T, W>;
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) {
      const typename S::V before = S::load(weight + j);
      S::store(weight + j, before - S::load(P + j) * step);
      S::store(P + j, before);
    }
    for (; j < n; ++j) {
      const T before = weight[j];
      weight[j] = before - step * P[j];
      P[j] = before;
    }
  }
};

// (15), one entry of a row.
KBFGS_INLINE double output_term(double weight, double saved, double a_bar, double next) {
  return (weight - saved) * next + saved * (next - a_bar);
}

struct SlopeBody {
  // sum of gradient*(weight - saved), in double: the difference cancels, and the sum decides
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* gradient, const T* weight, const T* saved, int64_t n, double* out) {
    using D = Simd<double, W>;
    const auto term = [&](int64_t j) {
      const auto moved = load_double<W>(weight + j) - load_double<W>(saved + j);
      return load_double<W>(gradient + j) * moved;
    };
    typename D::V a = {}, b = {};
    int64_t j = 0;
    for (; j + 2 * D::L <= n; j += 2 * D::L) {
      a += term(j);
      b += term(j + D::L);
    }
    double total = D::sum(a + b);
    for (; j < n; ++j)
      total += static_cast<double>(gradient[j]) *
               (static_cast<double>(weight[j]) - static_cast<double>(saved[j]));
    *out = total;
  }
};

struct OutputChangeBody {
  // sum of (weight - saved)*next + saved*(next - a_bar), in double: both differences cancel. The
  // two vectors are read anew for every row, from the nearest cache.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* weight, const T* saved, const T* a_bar, const T* next, int64_t n, double* out) {
    using D = Simd<double, W>;
    const auto term = [&](int64_t j) {
      const auto before = load_double<W>(saved + j), mean = load_double<W>(next + j);
      const auto moved = load_double<W>(weight + j) - before;
      return moved * mean + before * (mean - load_double<W>(a_bar + j));
    };
    typename D::V a = {}, b = {};
    int64_t j = 0;
    for (; j + 2 * D::L <= n; j += 2 * D::L) {
      a += term(j);
      b += term(j + D::L);
    }
    double total = D::sum(a + b);
    for (; j < n; ++j) total += output_term(weight[j], saved[j], a_bar[j], next[j]);
    *out = total;
  }
};

// Calls body(layer, row) for every row of every layer, in parallel by blocks of rows.
template <class Layers, class Weights, class Body>
void by_rows(const Layers& layers, const Weights& weights, const Body& body) {
  struct Block {
    size_t layer;
    int64_t begin, end;
  };
  std::vector<Block> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& w = weights(layers[l]);
    const int64_t rows = kGrainElements / std::max<int64_t>(1, w.n_a()) + 1;
    elements += w.n_g * w.n_a();
    for (int64_t i = 0; i < w.n_g; i += rows)
      blocks.push_back({l, i, std::min(i + rows, w.n_g)});
  }
  parallel_units(static_cast<int64_t>(blocks.size()), elements, [&](int64_t unit) {
    const Block& block = blocks[unit];
    for (int64_t i = block.begin; i < block.end; ++i) body(layers[block.layer], i);
  });
}

// Tiles that are compared with each other, and made at once.
constexpr size_t kMostTiles = 64;

template <typename T>
void left_product(const Precondition<T>& l) {
  if (l.H_g == nullptr) return;
  const Matrix<T> H_g(l.H_g, l.n_g, l.n_g, l.n_g), M(l.M, l.n_g, l.n_a, l.ld_M);
  gemm(l.product(), l.ld_product(), H_g, M, 1, 0);
}

template <typename T>
void right_product(const Precondition<T>& l) {
  if (l.H_a == nullptr) return;
  const Matrix<T> left(l.left(), l.n_g, l.n_a, l.ld_left()), H_a(l.H_a, l.n_a, l.n_a, l.n_a);
  gemm(l.P, l.ld_P, left, H_a, 1, 0);
}

// (3)
template <typename T>
void direction(const Precondition<T>& l) {
  left_product(l);
  right_product(l);
}

// Whether the scratch of two layers shares nothing: one behind the other, or side by side in rows.
template <typename T>
bool apart(const Precondition<T>& a, const Precondition<T>& b) {
  const auto end = [](const Precondition<T>& l) {
    return l.work + (l.n_g - 1) * l.ld_work + l.n_a;
  };
  if (end(a) <= b.work || end(b) <= a.work) return true;
  const Precondition<T>&left = a.work < b.work ? a : b, &right = a.work < b.work ? b : a;
  const int64_t column = (right.work - left.work) % left.ld_work;
  return left.ld_work == right.ld_work && column >= left.n_a &&
         column + right.n_a <= left.ld_work;
}

// (4), row i; where `ok` is false only P is written.
template <typename T>
void descend_row(const Descend<T>& l, int64_t i, bool ok) {
  const Parameters<T>& w = l.weights;
  T* P = l.P + i * w.n_a();
  if (!ok) {
    widen(w.W, i * w.d_in, w.d_in, P);
    if (w.bias()) P[w.d_in] = w.b.at(i);
    return;
  }
  const T step = static_cast<T>(l.step_size);
  by_pieces(w.d_in, w.W.own(), [&](int64_t at, int64_t n) {
    Piece<T> row;
    const int64_t first = i * w.d_in + at;
    vectorised<DescendBody>(row.change(w.W, first, n), P + at, n, step);
    row.write(w.W, first, n);
  });
  if (!w.bias()) return;
  const T before = w.b.at(i);
  w.b.set(i, before - step * P[w.d_in]);
  P[w.d_in] = before;
}

}  // namespace

template <typename T>
void momentum(const std::vector<Momentum<T>>& layers, double momentum, double weight_decay) {
  const T mu = static_cast<T>(momentum), rest = static_cast<T>(1 - momentum);
  const T gamma = static_cast<T>(weight_decay);
  const auto weights = [](const Momentum<T>& l) -> const Parameters<T>& { return l.weights; };
  by_rows(layers, weights, [&](const Momentum<T>& l, int64_t i) {  // (2)
    const Parameters<T>&w = l.weights, &g = l.gradient;
    T* M = l.M + i * w.n_a();
    by_pieces(w.d_in, w.W.own() && g.W.own(), [&](int64_t at, int64_t n) {
      Piece<T> dW, W;
      const int64_t first = i * w.d_in + at;
      vectorised<MomentumBody>(
          M + at, dW.read(g.W, first, n), W.read(w.W, first, n), n, mu, rest, gamma);
    });
    if (w.bias())
      M[w.d_in] = normal(mu * M[w.d_in] + rest * (g.b.at(i) + gamma * w.b.at(i)));
  });
}

template <typename T>
void precondition(const std::vector<Precondition<T>>& layers) {
  // Panels side by side where every thread has one, else one after the other with all threads.
  const auto all = [](const std::vector<Precondition<T>>& panels, auto product) {
    const int64_t count = static_cast<int64_t>(panels.size());
    if (count < thread_count()) return std::for_each(panels.begin(), panels.end(), product), void();
    int64_t elements = 0;
    for (const auto& l : panels) elements += l.n_g * l.n_a;
    parallel_units(count, elements, [&](int64_t i) { product(panels[i]); });
  };
  std::vector<Precondition<T>> tiles;
  const auto make = [&] {
    all(side_by_side(tiles), left_product<T>);
    all(one_below_the_other(tiles), right_product<T>);
    tiles.clear();
  };
  for (const auto& l : layers) {
    const bool alone = std::all_of(
        tiles.begin(), tiles.end(), [&](const Precondition<T>& t) { return apart(t, l); });
    if (!alone || tiles.size() == kMostTiles) make();
    tiles.push_back(l);
  }
  make();
}

template <typename T>
void descend(const std::vector<Descend<T>>& layers, bool ok) {
  const auto weights = [](const Descend<T>& l) -> const Parameters<T>& { return l.weights; };
  by_rows(layers, weights, [&](const Descend<T>& l, int64_t i) { descend_row(l, i, ok); });
}

template <typename T>
void slope(const std::vector<Slope<T>>& layers) {
  const auto weights = [](const Slope<T>& l) -> const Parameters<T>& { return l.weights; };
  by_rows(layers, weights, [](const Slope<T>& l, int64_t i) {  // (13)
    const Parameters<T>&w = l.weights, &g = l.gradient;
    const T* saved = l.saved + i * w.n_a();
    double total = 0;
    by_pieces(w.d_in, w.W.own() && g.W.own(), [&](int64_t at, int64_t n) {
      Piece<T> dW, W;
      const int64_t first = i * w.d_in + at;
      double part;
      vectorised<SlopeBody>(
          dW.read(g.W, first, n), W.read(w.W, first, n), saved + at, n, &part);
      total += part;
    });
    if (w.bias()) total += double(g.b.at(i)) * (double(w.b.at(i)) - double(saved[w.d_in]));
    l.slope[i] = static_cast<T>(total);
  });
}

template <typename T>
void output_change(const std::vector<OutputChange<T>>& layers) {
  const auto weights = [](const OutputChange<T>& l) -> const Parameters<T>& { return l.weights; };
  by_rows(layers, weights, [](const OutputChange<T>& l, int64_t i) {  // (15)
    const Parameters<T>& w = l.weights;
    const T* saved = l.saved + i * w.n_a();
    double total = 0;
    by_pieces(w.d_in, w.W.own(), [&](int64_t at, int64_t n) {
      Piece<T> W;
      double part;
      vectorised<OutputChangeBody>(
          W.read(w.W, i * w.d_in + at, n), saved + at, l.a_bar + at, l.a_bar_next + at, n, &part);
      total += part;
    });
    if (w.bias())
      total += output_term(w.b.at(i), saved[w.d_in], l.a_bar[w.d_in], l.a_bar_next[w.d_in]);
    l.change[i] = static_cast<T>(total);
  });
}

template <typename T>
void restore(const std::vector<Descend<T>>& layers) {
  const auto weights = [](const Descend<T>& l) -> const Parameters<T>& { return l.weights; };
  by_rows(layers, weights, [](const Descend<T>& l, int64_t i) {
    const Parameters<T>& w = l.weights;
    const T* saved = l.P + i * w.n_a();
    round(saved, w.W, i * w.d_in, w.d_in);
    if (w.bias()) w.b.set(i, saved[w.d_in]);
  });
}

template <typename T>
void kron_step(
    const std::vector<KronStep<T>>& layers, double mu, double weight_decay, bool ok) {
  for (const auto& l : layers) {  // one after the other: they may share `work`
    if (ok) {
      momentum<T>({l.momentum}, mu, weight_decay);
      direction(l.direction);
    }
    descend<T>({l.descend}, ok);
  }
}

#define KBFGS_INSTANTIATE(T)                                                  \
  template void momentum(const std::vector<Momentum<T>>&, double, double);    \
  template void precondition(const std::vector<Precondition<T>>&);            \
  template void descend(const std::vector<Descend<T>>&, bool);                \
  template void slope(const std::vector<Slope<T>>&);                          \
  template void output_change(const std::vector<OutputChange<T>>&);           \
  template void restore(const std::vector<Descend<T>>&);                      \
  template void kron_step(const std::vector<KronStep<T>>&, double, double, bool);
KBFGS_INSTANTIATE(float)
KBFGS_INSTANTIATE(double)
#undef KBFGS_INSTANTIATE

}  // namespace kbfgs
