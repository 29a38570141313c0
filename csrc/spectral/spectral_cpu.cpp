// P <- polar factor of P, from the Gram matrix of the shorter side: by Newton-Schulz iterations on it,
// or by inverses.
//
// Per layer, k = min(n_g, n_a), n = max: k^2 n FLOPs for the Gram matrix, 2 k^2 n for the last product,
// and between them (4t - 3) k^3 for t iterations or k^3 for every inverse. All products of iterations
// are of symmetric matrices that commute, so they are symmetric: only blocks on and above the diagonal
// are multiplied.
#include "spectral.h"

#include <cmath>
#include <limits>
#include <utility>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../factor_ema/mirror.h"
#include "inverse.h"

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
void symmetric_product(T* C, int64_t ld, const Matrix<T>& A, const Matrix<T>& B) {
  const int64_t k = A.rows, rows = block_rows(k), units = (k + rows - 1) / rows;
  parallel_units(units, k * A.cols, [&](int64_t unit) {
    const int64_t begin = unit * rows, end = std::min(begin + rows, k);
    gemm(C + begin * ld + begin, ld, rows_of(A, begin, end), columns_of(B, begin, k), 1, 0);
    vectorised<MirrorBody>(C, ld, k, begin, end);
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

// A k x k matrix whose rows begin on 64 bytes; what is between them is never read.
template <typename T>
struct Square {
  T* data;
  int64_t k, ld;
  int64_t size() const { return k * ld; }
  operator Matrix<T>() const { return Matrix<T>(data, k, k, ld); }
  void add_to_diagonal(double x) const {
    for (int64_t i = 0; i < k; ++i) data[i * ld + i] += static_cast<T>(x);
  }
};

// Z of G, by the products of (18); three matrices follow G.
template <typename T>
Square<T> by_products(Square<T> G, const std::vector<Quintic>& iterations) {
  const int64_t size = G.size();
  const auto behind = [&](const Square<T>& A) { return Square<T>{A.data + size, A.k, A.ld}; };
  const auto product = [](const Square<T>& C, const Matrix<T>& A, const Matrix<T>& B) {
    symmetric_product(C.data, C.ld, A, B);
  };
  Square<T> B = behind(G), Y = behind(B), Z = behind(Y);
  for (size_t t = 0; t < iterations.size(); ++t) {
    const auto& [a, b, c] = iterations[t];
    product(B, G, G);
    by_elements(size, [&](int64_t begin, int64_t end) {
      vectorised<QuinticBody>(
          B.data + begin, static_cast<const T*>(G.data + begin), end - begin,
          static_cast<T>(b), static_cast<T>(c));
    });
    B.add_to_diagonal(a);
    if (t + 1 < iterations.size()) {
      product(Y, B, G);
      product(G, B, Y);
    }
    if (t == 0) {
      std::swap(Z, B);
    } else {
      product(Y, B, Z);
      std::swap(Z, Y);
    }
  }
  return Z;
}

// Z of G, by the inverses of (18'), all at once; the other matrices and the work follow G.
template <typename T>
Square<T> by_inverses(Square<T> G, const Inverses& inverses) {
  const int64_t size = G.size();
  std::vector<T*> M;
  for (size_t i = 0; i < inverses.shifts.size(); ++i) M.push_back(G.data + i * size);
  by_elements(size, [&](int64_t begin, int64_t end) {
    for (size_t i = 1; i < M.size(); ++i) std::copy(G.data + begin, G.data + end, M[i] + begin);
  });
  for (size_t i = 0; i < M.size(); ++i)
    Square<T>{M[i], G.k, G.ld}.add_to_diagonal(inverses.shifts[i]);
  invert(M, M.back() + size, G.k, G.ld);
  by_elements(size, [&](int64_t begin, int64_t end) {
    const auto weight = [&](size_t i) { return static_cast<T>(inverses.weights[i]); };
    T* Z = G.data + begin;
    vectorised<ScaledBody>(Z, static_cast<const T*>(Z), end - begin, weight(0));
    for (size_t i = 1; i < M.size(); ++i)
      vectorised<QuinticBody>(
          Z, static_cast<const T*>(M[i] + begin), end - begin, weight(i), T{1});
  });
  G.add_to_diagonal(inverses.constant);
  return G;
}

// `root(G)` makes Z of G, in matrices that follow G.
template <typename T, class Root>
void polar_of(const Polar<T>& l, double ridge, const Root& root) {
  const int64_t k = l.k(), N = l.n_g * l.n_a;
  const bool wide = l.n_g <= l.n_a;
  const Square<T> G{l.work, k, rounded_up(k)};
  T* X = l.work + kSquares * G.ld * G.ld;

  const T factor = inverse_of_largest(l.P, N);
  if (factor != factor) return std::fill(l.P, l.P + N, factor);
  by_elements(N, [&](int64_t begin, int64_t end) {
    vectorised<ScaledBody>(X + begin, static_cast<const T*>(l.P + begin), end - begin, factor);
  });
  const Matrix<T> stored(X, l.n_g, l.n_a, l.n_a);
  const Matrix<T> short_side = wide ? stored : stored.transposed();
  symmetric_product(G.data, G.ld, short_side, short_side.transposed());  // (16)

  double squares = 0, trace = 0;
  for (int64_t i = 0; i < k; ++i) {
    double row;
    vectorised<SquaresBody>(static_cast<const T*>(G.data + i * G.ld), k, &row);
    squares += row, trace += static_cast<double>(G.data[i * G.ld + i]);
  }
  const double shift = ridge * trace / static_cast<double>(k);
  const double norm =
      std::max(std::sqrt(squares) + shift, double(std::numeric_limits<T>::min()));
  by_elements(G.size(), [&](int64_t begin, int64_t end) {  // (17)
    vectorised<ScaledBody>(
        G.data + begin, static_cast<const T*>(G.data + begin), end - begin,
        static_cast<T>(1 / norm));
  });
  G.add_to_diagonal(shift / norm);

  const Matrix<T> Z = root(G);
  const double last = 1 / std::sqrt(norm);  // (19)
  if (wide)
    gemm(l.P, l.n_a, Z, stored, last, 0);
  else
    gemm(l.P, l.n_a, stored, Z, last, 0);
}

}  // namespace

template <typename T>
void polar(
    const std::vector<Polar<T>>& layers, const std::vector<Quintic>& iterations, double ridge) {
  for (const auto& l : layers)
    polar_of(l, ridge, [&](const Square<T>& G) { return by_products(G, iterations); });
}

template <typename T>
void polar(const std::vector<Polar<T>>& layers, const Inverses& inverses, double ridge) {
  for (const auto& l : layers)
    polar_of(l, ridge, [&](const Square<T>& G) { return by_inverses(G, inverses); });
}

template void polar(const std::vector<Polar<float>>&, const std::vector<Quintic>&, double);
template void polar(const std::vector<Polar<double>>&, const std::vector<Quintic>&, double);
template void polar(const std::vector<Polar<float>>&, const Inverses&, double);
template void polar(const std::vector<Polar<double>>&, const Inverses&, double);

}  // namespace kbfgs
