// P <- polar factor of P, by Newton-Schulz iterations on the Gram matrix of the shorter side.
//
// Per layer, k = min(n_g, n_a), n = max, t iterations: k^2 n FLOPs for the Gram matrix, (4t - 3) k^3
// for the iterations and 2 k^2 n for the last product. All products but the last are of symmetric
// matrices that commute, so they are symmetric: only blocks on and above the diagonal are multiplied.
#include "spectral.h"

#include <cmath>
#include <limits>
#include <utility>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../factor_ema/mirror.h"

namespace kbfgs {

namespace {

// Largest magnitude, and 0 times everything: NaN where anything is not finite.
struct LargestBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(const T* x, int64_t n, T* largest, T* nothing) {
    using S = Simd<T, W>;
    typename S::V most = {}, zero = {};
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) {
      const typename S::V v = S::load(x + j), size = v < 0 ? -v : v;
      most = size > most ? size : most;
      zero += v * static_cast<T>(0);
    }
    T lane[S::L];
    S::store(lane, most);
    T top = 0, sum = S::sum(zero);
    for (int i = 0; i < S::L; ++i) top = std::max(top, lane[i]);
    for (; j < n; ++j) {
      top = std::max(top, std::abs(x[j]));
      sum += x[j] * static_cast<T>(0);
    }
    *largest = top, *nothing = sum;
  }
};

struct ScaledBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* out, const T* x, int64_t n, T factor) {
    using S = Simd<T, W>;
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) S::store(out + j, S::normal(S::load(x + j) * factor));
    for (; j < n; ++j) out[j] = normal(x[j] * factor);
  }
};

struct SquaresBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(const T* x, int64_t n, double* out) {
    using D = Simd<double, W>;
    typename D::V a = {}, b = {};
    int64_t j = 0;
    for (; j + 2 * D::L <= n; j += 2 * D::L) {
      const auto u = load_double<W>(x + j), v = load_double<W>(x + j + D::L);
      a += u * u;
      b += v * v;
    }
    double total = D::sum(a + b);
    for (; j < n; ++j) total += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    *out = total;
  }
};

struct QuinticBody {
  // B <- b*G + c*B
  template <int W, typename T>
  static KBFGS_INLINE void run(T* B, const T* G, int64_t n, T b, T c) {
    using S = Simd<T, W>;
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) S::store(B + j, S::load(G + j) * b + S::load(B + j) * c);
    for (; j < n; ++j) B[j] = b * G[j] + c * B[j];
  }
};

// Calls body(begin, end) for blocks of [0, n), in parallel.
template <class Body>
void by_elements(int64_t n, const Body& body) {
  const int64_t units = (n + kGrainElements - 1) / kGrainElements;
  parallel_units(units, n, [&](int64_t unit) {
    const int64_t begin = unit * kGrainElements;
    body(begin, std::min(begin + kGrainElements, n));
  });
}

// As in factor_ema_cpu.cpp, where the measurement is.
constexpr int64_t block_rows(int64_t k) {
  return std::clamp<int64_t>((k / 4 + 15) / 16 * 16, 32, 96);
}

template <typename T>
Matrix<T> rows_of(Matrix<T> A, int64_t begin, int64_t end) {
  A.data += begin * A.row_stride, A.rows = end - begin;
  return A;
}

template <typename T>
Matrix<T> columns_of(const Matrix<T>& A, int64_t begin, int64_t end) {
  return rows_of(A.transposed(), begin, end).transposed();
}

// C = A*B, which is known to be symmetric (k x k): blocks on and right of the diagonal, then mirrored.
// A block multiplies (k - begin) columns, so the first are the longest and threads end together.
template <typename T>
void symmetric_product(T* C, const Matrix<T>& A, const Matrix<T>& B) {
  const int64_t k = A.rows, rows = block_rows(k), units = (k + rows - 1) / rows;
  parallel_units(units, k * A.cols, [&](int64_t unit) {
    const int64_t begin = unit * rows, end = std::min(begin + rows, k);
    gemm(C + begin * k + begin, k, rows_of(A, begin, end), columns_of(B, begin, k), 1, 0);
    vectorised<MirrorBody>(C, k, begin, end);
  });
}

// The factor that brings the largest entry to 1; NaN where an entry is not finite.
template <typename T>
T inverse_of_largest(const T* P, int64_t n) {
  T largest = 0, nothing = 0;
  vectorised<LargestBody>(P, n, &largest, &nothing);
  if (nothing != 0) return std::numeric_limits<T>::quiet_NaN();
  return 1 / std::max(largest, std::numeric_limits<T>::min());
}

template <typename T>
void polar_of(const Polar<T>& l, const std::vector<Quintic>& iterations, double ridge) {
  const int64_t k = l.k(), size = k * k, N = l.n_g * l.n_a;
  const bool wide = l.n_g <= l.n_a;
  T *G = l.work, *B = G + size, *Y = B + size, *Z = Y + size, *X = Z + size;
  const auto square = [k](const T* data) { return Matrix<T>(data, k, k, k); };

  const T factor = inverse_of_largest(l.P, N);
  if (factor != factor) return std::fill(l.P, l.P + N, factor);
  by_elements(N, [&](int64_t begin, int64_t end) {
    vectorised<ScaledBody>(X + begin, static_cast<const T*>(l.P + begin), end - begin, factor);
  });
  const Matrix<T> stored(X, l.n_g, l.n_a, l.n_a);
  const Matrix<T> short_side = wide ? stored : stored.transposed();
  symmetric_product(G, short_side, short_side.transposed());  // (16)

  double squares = 0, trace = 0;
  vectorised<SquaresBody>(static_cast<const T*>(G), size, &squares);
  for (int64_t i = 0; i < k; ++i) trace += static_cast<double>(G[i * k + i]);
  const double shift = ridge * trace / static_cast<double>(k);
  const double norm =
      std::max(std::sqrt(squares) + shift, double(std::numeric_limits<T>::min()));
  by_elements(size, [&](int64_t begin, int64_t end) {  // (17)
    vectorised<ScaledBody>(
        G + begin, static_cast<const T*>(G + begin), end - begin, static_cast<T>(1 / norm));
  });
  for (int64_t i = 0; i < k; ++i) G[i * k + i] += static_cast<T>(shift / norm);

  for (size_t t = 0; t < iterations.size(); ++t) {  // (18)
    const auto& [a, b, c] = iterations[t];
    symmetric_product(B, square(G), square(G));
    by_elements(size, [&](int64_t begin, int64_t end) {
      vectorised<QuinticBody>(
          B + begin, static_cast<const T*>(G + begin), end - begin, static_cast<T>(b),
          static_cast<T>(c));
    });
    for (int64_t i = 0; i < k; ++i) B[i * k + i] += static_cast<T>(a);
    if (t + 1 < iterations.size()) {
      symmetric_product(Y, square(B), square(G));
      symmetric_product(G, square(B), square(Y));
    }
    if (t == 0) {
      std::swap(Z, B);
    } else {
      symmetric_product(Y, square(B), square(Z));
      std::swap(Z, Y);
    }
  }
  const double last = 1 / std::sqrt(norm);  // (19)
  if (wide)
    gemm(l.P, l.n_a, square(Z), stored, last, 0);
  else
    gemm(l.P, l.n_a, stored, square(Z), last, 0);
}

}  // namespace

template <typename T>
void polar(
    const std::vector<Polar<T>>& layers, const std::vector<Quintic>& iterations, double ridge) {
  for (const auto& l : layers) polar_of(l, iterations, ridge);
}

template void polar(const std::vector<Polar<float>>&, const std::vector<Quintic>&, double);
template void polar(const std::vector<Polar<double>>&, const std::vector<Quintic>&, double);

}  // namespace kbfgs
