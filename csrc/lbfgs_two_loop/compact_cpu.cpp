// out = H Q by the compact form (11), H_0 = I:
//   R = triu(S Y'), C = diag(S Y'), u = R^-1 S Q, v = R^-T (C u + Y Y' u - Y Q), out = Q + S'v - Y'u
// with the rows of S and Y from the oldest pair to the newest.
//
// f pairs filled: 8*f*n*columns FLOPs in two products of inner dimension n and 2f, 4*f^2*n for the
// Gram matrix, 4*f^2*columns in between. Scratch of one call: 3*f*n + 2*f*(columns + f) elements.
#include <algorithm>
#include <memory>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "lbfgs_two_loop.h"

namespace kbfgs {

namespace {

constexpr int64_t kTileBytes = 256;  // of a row of columns: four of the widest vectors

struct MiddleBody {
  // One packed tile t (2f rows of kTileBytes): on entry S Q above Y Q, on return -u above v.
  // G is 2f x f: S Y' above Y Y'.
  template <int W, typename T>
  static KBFGS_INLINE void run(T* t, const T* G, int64_t f) {
    using S = Simd<T, W>;
    constexpr int64_t kTile = kTileBytes / sizeof(T);
    for (int64_t col = 0; col < kTile; col += 4 * S::L) {
      T *u = t + col, *v = t + f * kTile + col;
      for (int64_t i = f - 1; i >= 0; --i) {  // u = R^-1 S Q
        typename S::V x[4];
        for (int k = 0; k < 4; ++k) x[k] = S::load(u + i * kTile + k * S::L);
        subtract<W>(x, u, G + i * f, 1, i + 1, f);
        for (int k = 0; k < 4; ++k)
          S::store(u + i * kTile + k * S::L, x[k] / S::all(G[i * f + i]));
      }
      for (int64_t i = 0; i < f; ++i) {  // v = R^-T (C u + Y Y' u - Y Q), by rows from above
        typename S::V x[4], w[4] = {};
        for (int k = 0; k < 4; ++k)
          x[k] = S::load(u + i * kTile + k * S::L) * G[i * f + i] -
                 S::load(v + i * kTile + k * S::L);
        subtract<W>(w, u, G + (f + i) * f, 1, 0, f);
        for (int k = 0; k < 4; ++k) x[k] -= w[k];
        subtract<W>(x, v, G + i, f, 0, i);
        for (int k = 0; k < 4; ++k)
          S::store(v + i * kTile + k * S::L, x[k] / S::all(G[i * f + i]));
      }
      for (int64_t i = 0; i < f; ++i)
        for (int k = 0; k < 4; ++k)
          S::store(u + i * kTile + k * S::L, -S::load(u + i * kTile + k * S::L));
    }
  }

  // x -= sum over j in [begin, end) of g[j*stride] * row j of `rows`
  template <int W, typename T, typename V>
  static KBFGS_INLINE void subtract(
      V (&x)[4], const T* rows, const T* g, int64_t stride, int64_t begin, int64_t end) {
    using S = Simd<T, W>;
    constexpr int64_t kTile = kTileBytes / sizeof(T);
    for (int64_t j = begin; j < end; ++j)
      for (int k = 0; k < 4; ++k)
        x[k] -= S::load(rows + j * kTile + k * S::L) * g[j * stride];
  }
};

// The middle on columns [begin, begin + a tile) of Z, 2f x columns.
template <typename T>
void middle(T* Z, const T* G, int64_t f, int64_t columns, int64_t begin) {
  constexpr int64_t C = kTileBytes / sizeof(T);
  const int64_t width = std::min(C, columns - begin);
  const std::unique_ptr<T[]> t(new T[2 * f * C]);
  for (int64_t i = 0; i < 2 * f; ++i) {
    const T* from = Z + i * columns + begin;
    std::copy(from, from + width, t.get() + i * C);
    std::fill(t.get() + i * C + width, t.get() + (i + 1) * C, T{0});
  }
  vectorised<MiddleBody>(t.get(), G, f);
  for (int64_t i = 0; i < 2 * f; ++i)
    std::copy(t.get() + i * C, t.get() + i * C + width, Z + i * columns + begin);
}

}  // namespace

template <typename T>
void compact(const TwoLoop<T>& l) {
  const int64_t n = l.ring.n, f = l.ring.filled(), columns = l.columns;
  const std::unique_ptr<T[]> memory(new T[3 * f * n + 2 * f * (columns + f)]);
  T *pairs = memory.get(), *Z = pairs + 3 * f * n, *G = Z + 2 * f * columns;
  for (int64_t k = 0; k < f; ++k) {  // S, Y, S again: [S; Y] multiplies Q, [Y; S]' the middle
    const T *s = l.ring.S + l.ring.row(k) * n, *y = l.ring.Y + l.ring.row(k) * n;
    std::copy(s, s + n, pairs + k * n);
    std::copy(y, y + n, pairs + (f + k) * n);
    std::copy(s, s + n, pairs + (2 * f + k) * n);
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* from = l.Q + i * l.Q_stride;
    std::copy(from, from + columns, l.out + i * columns);
  }
  if (f == 0) return;
  const Matrix<T> SY(pairs, 2 * f, n, n), YS(pairs + f * n, 2 * f, n, n);
  const Matrix<T> Y(pairs + f * n, f, n, n);
  gemm(G, f, SY, Y.transposed(), 1, 0);
  gemm(Z, columns, SY, Matrix<T>(l.out, n, columns, columns), 1, 0);
  constexpr int64_t C = kTileBytes / sizeof(T);
  parallel_units((columns + C - 1) / C, [&](int64_t tile) {
    middle(Z, static_cast<const T*>(G), f, columns, tile * C);
  });
  gemm(l.out, columns, YS.transposed(), Matrix<T>(Z, 2 * f, columns, columns), 1, 1);
}

template void compact(const TwoLoop<float>&);
template void compact(const TwoLoop<double>&);

}  // namespace kbfgs
