// Operations on single vectors of one layer, O(n) each. Dot products are accumulated in double,
// since curvature quotients decide signs.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace kbfgs {

struct DotBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(const T* x, const T* y, int64_t n, double* out) {
    using D = Simd<double, W>;
    typename D::V a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * D::L <= n; i += 4 * D::L) {
      a += load_double<W>(x + i) * load_double<W>(y + i);
      b += load_double<W>(x + i + D::L) * load_double<W>(y + i + D::L);
      c += load_double<W>(x + i + 2 * D::L) * load_double<W>(y + i + 2 * D::L);
      d += load_double<W>(x + i + 3 * D::L) * load_double<W>(y + i + 3 * D::L);
    }
    double total = D::sum((a + b) + (c + d));
    for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    *out = total;
  }
};

// x'y rounded to T once: it overflows where the reference's does.
template <typename T>
double dot(const T* x, const T* y, int64_t n) {
  double total;
  vectorised<DotBody>(x, y, n, &total);
  return static_cast<double>(static_cast<T>(total));
}

// ||x||, without the overflow of a sum of squares in T.
template <typename T>
double norm(const T* x, int64_t n) {
  double total;
  vectorised<DotBody>(x, x, n, &total);
  return std::sqrt(total);
}

struct AxpbyBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* x, T a, const T* y, T b, int64_t n) {
    using S = Simd<T, W>;
    int64_t i = 0;
    for (; i + S::L <= n; i += S::L)
      S::store(x + i, S::load(x + i) * a + S::load(y + i) * b);
    for (; i < n; ++i) x[i] = a * x[i] + b * y[i];
  }
};

// x <- a*x + b*y
template <typename T>
void axpby(T* x, T a, const T* y, T b, int64_t n) {
  vectorised<AxpbyBody>(x, a, y, b, n);
}

// Whether every element is finite: x*0 is 0 for finite x and NaN otherwise, so a sum decides.
struct FiniteBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(const T* x, int64_t n, bool* finite) {
    using S = Simd<T, W>;
    typename S::V sum = {};
    int64_t i = 0;
    for (; i + S::L <= n; i += S::L) sum += S::load(x + i) * static_cast<T>(0);
    T total = S::sum(sum);
    for (; i < n; ++i) total += x[i] * static_cast<T>(0);
    *finite = total == static_cast<T>(0);
  }
};

template <typename T>
bool all_finite(const T* x, int64_t n) {
  bool finite;
  vectorised<FiniteBody>(x, n, &finite);
  return finite;
}

}  // namespace kbfgs
