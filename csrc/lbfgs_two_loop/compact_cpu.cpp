// out = H Q by the compact form (11), H_0 = I:
//   R = triu(S Y'), C = diag(S Y'), u = R^-1 S Q, v = R^-T (C u + Y Y' u - Y Q), out = Q + S'v - Y'u
// with the rows of S and Y from the oldest pair to the newest.
//
// f pairs filled: 8*f*n*columns FLOPs in two products of inner dimension n and 2f, 4*f^2*n for the
// Gram matrix, 4*f^2*columns in between. Columns are independent, so a tile of them goes through all
// of it on one thread. Scratch of one call, per layer: 3*f*n + 2*f^2 elements; and 2 KB * f a thread.
#include <algorithm>
#include <memory>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "lbfgs_two_loop.h"

namespace kbfgs {

namespace {

// Columns of a tile, a multiple of four of the widest vectors.
template <typename T>
constexpr int64_t kTile = 1024 / sizeof(T);

struct MiddleBody {
  // One tile t (2f rows of kTile columns): on entry S Q above Y Q, on return -u above v.
  // G is 2f x f: S Y' above Y Y'.
  template <int W, typename T>
  static KBFGS_INLINE void run(T* t, const T* G, int64_t f) {
    using S = Simd<T, W>;
    for (int64_t col = 0; col < kTile<T>; col += 4 * S::L) {
      T *u = t + col, *v = t + f * kTile<T> + col;
      for (int64_t i = f - 1; i >= 0; --i) {  // u = R^-1 S Q
        typename S::V x[4];
        for (int k = 0; k < 4; ++k) x[k] = S::load(u + i * kTile<T> + k * S::L);
        subtract<W>(x, u, G + i * f, 1, i + 1, f);
        for (int k = 0; k < 4; ++k)
          S::store(u + i * kTile<T> + k * S::L, x[k] / S::all(G[i * f + i]));
      }
      for (int64_t i = 0; i < f; ++i) {  // v = R^-T (C u + Y Y' u - Y Q), by rows from above
        typename S::V x[4], w[4] = {};
        for (int k = 0; k < 4; ++k)
          x[k] = S::load(u + i * kTile<T> + k * S::L) * G[i * f + i] -
                 S::load(v + i * kTile<T> + k * S::L);
        subtract<W>(w, u, G + (f + i) * f, 1, 0, f);
        for (int k = 0; k < 4; ++k) x[k] -= w[k];
        subtract<W>(x, v, G + i, f, 0, i);
        for (int k = 0; k < 4; ++k)
          S::store(v + i * kTile<T> + k * S::L, x[k] / S::all(G[i * f + i]));
      }
      for (int64_t i = 0; i < f; ++i)
        for (int k = 0; k < 4; ++k)
          S::store(u + i * kTile<T> + k * S::L, -S::load(u + i * kTile<T> + k * S::L));
    }
  }

  // x -= sum over j in [begin, end) of g[j*stride] * row j of `rows`
  template <int W, typename T, typename V>
  static KBFGS_INLINE void subtract(
      V (&x)[4], const T* rows, const T* g, int64_t stride, int64_t begin, int64_t end) {
    using S = Simd<T, W>;
    for (int64_t j = begin; j < end; ++j)
      for (int k = 0; k < 4; ++k)
        x[k] -= S::load(rows + j * kTile<T> + k * S::L) * g[j * stride];
  }
};

// The pairs of one layer in order, S, Y, S again (3f x n: [S; Y] multiplies Q, [Y; S]' the middle),
// and their Gram matrix, S Y' above Y Y' (2f x f).
template <typename T>
struct Pairs {
  std::unique_ptr<T[]> rows;
  std::unique_ptr<T[]> gram;
};

template <typename T>
Pairs<T> gather(const Ring<T>& ring) {
  const int64_t n = ring.n, f = ring.filled();
  Pairs<T> pairs{std::unique_ptr<T[]>(new T[3 * f * n]), std::unique_ptr<T[]>(new T[2 * f * f])};
  T* rows = pairs.rows.get();
  for (int64_t k = 0; k < f; ++k) {
    const T *s = ring.S + ring.row(k) * n, *y = ring.Y + ring.row(k) * n;
    std::copy(s, s + n, rows + k * n);
    std::copy(y, y + n, rows + (f + k) * n);
    std::copy(s, s + n, rows + (2 * f + k) * n);
  }
  const Matrix<T> SY(rows, 2 * f, n, n), Y(rows + f * n, f, n, n);
  if (f > 0) gemm(pairs.gram.get(), f, SY, Y.transposed(), 1, 0);
  return pairs;
}

// Columns [begin, end) of out, from end to end on one thread.
template <typename T>
void apply(const TwoLoop<T>& l, const Pairs<T>& pairs, int64_t begin, int64_t end) {
  const int64_t n = l.ring.n, f = l.ring.filled(), width = end - begin;
  for (int64_t i = 0; i < n; ++i) {
    const T* from = l.Q + i * l.Q_stride;
    std::copy(from + begin, from + end, l.out + i * l.columns + begin);
  }
  if (f == 0) return;
  const T* rows = pairs.rows.get();
  const Matrix<T> SY(rows, 2 * f, n, n), YS(rows + f * n, 2 * f, n, n);
  const std::unique_ptr<T[]> Z(new T[2 * f * kTile<T>]);
  if (width < kTile<T>) std::fill(Z.get(), Z.get() + 2 * f * kTile<T>, T{0});
  T* out = l.out + begin;
  gemm(Z.get(), kTile<T>, SY, Matrix<T>(out, n, width, l.columns), 1, 0);
  vectorised<MiddleBody>(Z.get(), static_cast<const T*>(pairs.gram.get()), f);
  gemm(out, l.columns, YS.transposed(), Matrix<T>(Z.get(), 2 * f, width, kTile<T>), 1, 1);
}

}  // namespace

template <typename T>
void compact(const std::vector<TwoLoop<T>>& layers) {
  struct Unit {
    size_t layer;
    int64_t begin;
  };
  std::vector<Unit> units;
  std::vector<Pairs<T>> pairs(layers.size());
  int64_t gram = 0, elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t f = layers[l].ring.filled(), n = layers[l].ring.n;
    gram += f * f * n;
    elements += 2 * f * n * layers[l].columns;
    for (int64_t c = 0; c < layers[l].columns; c += kTile<T>) units.push_back({l, c});
  }
  parallel_units(static_cast<int64_t>(layers.size()), gram, [&](int64_t l) {
    pairs[l] = gather(layers[l].ring);
  });
  parallel_units(static_cast<int64_t>(units.size()), elements, [&](int64_t unit) {
    const auto [l, begin] = units[unit];
    apply(layers[l], pairs[l], begin, std::min(begin + kTile<T>, layers[l].columns));
  });
}

template void compact(const std::vector<TwoLoop<float>>&);
template void compact(const std::vector<TwoLoop<double>>&);

}  // namespace kbfgs
