// Inverses of symmetric positive definite matrices by halves: M = R'R with R upper triangular,
// V = R^-1, M^-1 = VV'. With M = [A B; B' D], V_A of A, W = V_A' B and V_D of D - W'W,
//
//   V = [V_A  -V_A W V_D]      M^-1 = [V_A V_A' + XX'  X V_D']
//       [             V_D]             [               V_D V_D'],  X = -V_A W V_D
//
// k^3 FLOPs and errors as LAPACK's; W = A^-1 B would save an eighth of the time, and lose a hundred
// times as much where the spectrum is wide.
#include "inverse.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../factor_ema/mirror.h"

namespace kbfgs {

namespace {

// Rows of what is done entry by entry, and of a block of a product. One thread, 784 x 784 floats, AMD
// Zen 4 with MKL: three inverses take 24 ms, LAPACK's 32.
constexpr int64_t kDirect = 32, kRows = 64;

// Up to here a thread takes a matrix from end to end: less waiting for each other, and a cache of its
// own that holds it.
constexpr int64_t kAlone = 256;

// V in place of M, k <= kDirect: on and above the diagonal read, zeros below it written.
struct RootBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* M, int64_t k, int64_t ld) {
    for (int64_t p = 0; p < k; ++p) {  // R
      T* row = M + p * ld;
      const T scale = 1 / std::sqrt(row[p]);
      for (int64_t j = 0; j < p; ++j) row[j] = 0;
      for (int64_t j = p; j < k; ++j) row[j] *= scale;
      for (int64_t i = p + 1; i < k; ++i) {
        T* below = M + i * ld;
        const T factor = row[i];
        for (int64_t j = i; j < k; ++j) below[j] -= factor * row[j];
      }
    }
    for (int64_t i = k - 1; i >= 0; --i) {  // its inverse, from the last row on
      T* row = M + i * ld;
      T R[kDirect];
      for (int64_t j = i; j < k; ++j) R[j] = row[j];
      for (int64_t j = i; j < k; ++j) row[j] = 0;
      row[i] = 1;
      for (int64_t p = i + 1; p < k; ++p) {
        const T* behind = M + p * ld;
        const T factor = R[p];
        for (int64_t j = p; j < k; ++j) row[j] -= factor * behind[j];
      }
      const T scale = 1 / R[i];
      for (int64_t j = i; j < k; ++j) row[j] *= scale;
    }
  }
};

// VV' in place of V, k <= kDirect; on and above the diagonal.
struct SquareBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* V, int64_t k, int64_t ld) {
    T column[kDirect][kDirect];
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = i; j < k; ++j) column[j][i] = V[i * ld + j], V[i * ld + j] = 0;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t p = i; p < k; ++p)
        for (int64_t j = i; j <= p; ++j) V[i * ld + j] += column[p][i] * column[p][j];
  }
};

template <typename T>
struct Halves {
  int64_t h, rest, ld, ld_W;
  T *A, *B, *D, *W;
  Halves(T* M, T* work, int64_t k, int64_t ld)
      : h(rounded_up(k / 2)), rest(k - h), ld(ld), ld_W(rounded_up(rest)), A(M), B(M + h),
        D(B + h * ld), W(work) {}
  // Rows and columns from a place on.
  Matrix<T> of(const T* X, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const int64_t stride = X == W ? ld_W : ld;
    return Matrix<T>(X + row * stride + col, rows, cols, stride);
  }
};

// Calls body(halves, begin, end) for blocks of n rows or columns of every matrix, in parallel.
template <typename T, class Body>
void by_blocks(const std::vector<Halves<T>>& all, int64_t n, const Body& body) {
  const int64_t count = static_cast<int64_t>(all.size()), blocks = (n + kRows - 1) / kRows;
  parallel_units(count * blocks, count * n * n, [&](int64_t unit) {
    const int64_t begin = unit / count * kRows;
    body(all[unit % count], begin, std::min(begin + kRows, n));
  });
}

template <typename T>
using Places = std::vector<std::pair<T*, T*>>;  // of every matrix: itself, its work

template <typename T>
Places<T> moved(Places<T> all, int64_t by, int64_t work) {
  for (auto& [M, W] : all) M += by, W += work;
  return all;
}

template <typename T>
std::vector<Halves<T>> halves(const Places<T>& all, int64_t k, int64_t ld) {
  std::vector<Halves<T>> out;
  for (const auto& [M, W] : all) out.emplace_back(M, W, k, ld);
  return out;
}

// Calls body(matrix, work) for every matrix, in parallel.
template <typename T, class Body>
void one_by_one(const Places<T>& all, int64_t k, const Body& body) {
  const int64_t count = static_cast<int64_t>(all.size());
  parallel_units(
      count, count * k * k, [&](int64_t i) { body(all[i].first, all[i].second); });
}

template <class Body, typename T>
void directly(const Places<T>& all, int64_t k, int64_t ld) {
  one_by_one(all, k, [&](T* M, T*) { vectorised<Body>(M, k, ld); });
}

// V in place of M, zeros below the diagonal.
template <typename T>
void roots(const Places<T>& all, int64_t k, int64_t ld) {
  if (k <= kDirect) return directly<RootBody>(all, k, ld);
  if (k <= kAlone && all.size() > 1)
    return one_by_one(all, k, [&](T* M, T* W) { roots(Places<T>{{M, W}}, k, ld); });
  const auto parts = halves(all, k, ld);
  const int64_t h = parts[0].h, rest = parts[0].rest;
  using H = Halves<T>;
  roots(moved(all, 0, 0), h, ld);
  by_blocks(parts, h, [&](const H& p, int64_t b, int64_t e) {  // W = V_A' B
    const Matrix<T> V = p.of(p.A, 0, e, b, e - b);
    gemm(p.W + b * p.ld_W, p.ld_W, V.transposed(), p.of(p.B, 0, e, 0, rest), 1, 0);
  });
  by_blocks(parts, rest, [&](const H& p, int64_t b, int64_t e) {  // D - W'W
    const Matrix<T> left = p.of(p.W, 0, h, b, e - b), right = p.of(p.W, 0, h, b, rest - b);
    gemm(p.D + b * ld + b, ld, left.transposed(), right, -1, 1);
    for (int64_t i = b; i < e; ++i) std::fill_n(p.D + i * ld - h, h, T{0});
  });
  roots(moved(all, h * ld + h, h * parts[0].ld_W), rest, ld);
  by_blocks(parts, rest, [&](const H& p, int64_t b, int64_t e) {  // B = W V_D
    gemm(p.B + b, ld, p.of(p.W, 0, h, 0, e), p.of(p.D, 0, e, b, e - b), 1, 0);
  });
  by_blocks(parts, h, [&](const H& p, int64_t b, int64_t e) {  // W = -V_A B
    const Matrix<T> V = p.of(p.A, b, e - b, b, h - b);
    gemm(p.W + b * p.ld_W, p.ld_W, V, p.of(p.B, b, h - b, 0, rest), -1, 0);
  });
  by_blocks(parts, h, [&](const H& p, int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) std::copy_n(p.W + i * p.ld_W, rest, p.B + i * ld);
  });
}

// VV' in place of V, on and above the diagonal.
template <typename T>
void squares(const Places<T>& all, int64_t k, int64_t ld) {
  if (k <= kDirect) return directly<SquareBody>(all, k, ld);
  if (k <= kAlone && all.size() > 1)
    return one_by_one(all, k, [&](T* M, T* W) { squares(Places<T>{{M, W}}, k, ld); });
  const auto parts = halves(all, k, ld);
  const int64_t h = parts[0].h, rest = parts[0].rest;
  using H = Halves<T>;
  squares(all, h, ld);
  by_blocks(parts, h, [&](const H& p, int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) std::copy_n(p.B + i * ld, rest, p.W + i * p.ld_W);
  });
  by_blocks(parts, h, [&](const H& p, int64_t b, int64_t e) {
    const Matrix<T> left = p.of(p.W, b, e - b, 0, rest), right = p.of(p.W, b, h - b, 0, rest);
    gemm(p.A + b * ld + b, ld, left, right.transposed(), 1, 1);
  });
  by_blocks(parts, rest, [&](const H& p, int64_t b, int64_t e) {  // X V_D'
    const Matrix<T> V = p.of(p.D, b, e - b, b, rest - b);
    gemm(p.B + b, ld, p.of(p.W, 0, h, b, rest - b), V.transposed(), 1, 0);
  });
  squares(moved(all, h * ld + h, 0), rest, ld);
}

}  // namespace

template <typename T>
void invert(const std::vector<T*>& M, T* work, int64_t k, int64_t ld) {
  Places<T> all;
  for (size_t i = 0; i < M.size(); ++i) all.emplace_back(M[i], work + i * inverse_workspace(k));
  roots(all, k, ld);
  squares(all, k, ld);
  const int64_t count = static_cast<int64_t>(M.size()), blocks = (k + kRows - 1) / kRows;
  parallel_units(count * blocks, count * k * k, [&](int64_t unit) {
    const int64_t begin = unit / count * kRows;
    vectorised<MirrorBody>(M[unit % count], ld, k, begin, std::min(begin + kRows, k));
  });
}

template void invert(const std::vector<float*>&, float*, int64_t, int64_t);
template void invert(const std::vector<double*>&, double*, int64_t, int64_t);

}  // namespace kbfgs
