// Fixed-width vectors on the compilers' vector extension (GCC, Clang): arithmetic is plain C++.
// Reductions keep independent accumulators by hand, so that no fast-math is needed anywhere.
#pragma once

#include <cstdint>
#include <limits>

#include "isa.h"

namespace kbfgs {

// x, or 0 where it is denormal: many processors multiply those in microcode. NaN stays.
template <typename T>
KBFGS_INLINE T normal(T x) {
  constexpr T least = std::numeric_limits<T>::min();
  return x < least && x > -least ? T(0) : x;
}

template <typename T, int W>
struct Simd {
  static constexpr int L = W / static_cast<int>(sizeof(T));
  typedef T V __attribute__((vector_size(W)));

  static KBFGS_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, W);
    return v;
  }
  static KBFGS_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, W); }
  static KBFGS_INLINE V all(T x) { return V{} + x; }
  static KBFGS_INLINE V normal(V v) {
    using Bits = decltype(v < v);
    const Bits exponent = reinterpret_cast<Bits>(all(std::numeric_limits<T>::infinity()));
    return (reinterpret_cast<Bits>(v) & exponent) != 0 ? v : V{};
  }
  // Half and half: in registers down to 16 bytes.
  static KBFGS_INLINE T sum(V v) {
    T lane[L];
    __builtin_memcpy(lane, &v, W);
    if constexpr (W > 16) {
      using Half = Simd<T, W / 2>;
      return Half::sum(Half::load(lane) + Half::load(lane + L / 2));
    } else {
      for (int width = L / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
      return lane[0];
    }
  }
};

// Rounds v here: the compiler may not contract the product that it holds into a fused multiply-add.
template <typename V>
KBFGS_INLINE void rounded([[maybe_unused]] V& v) {
#if defined(__clang__)
  // Clang contracts within an expression only, and v is a variable.
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
}

// The next `W / sizeof(double)` elements of p, as doubles.
template <int W>
KBFGS_INLINE typename Simd<double, W>::V load_double(const double* p) {
  return Simd<double, W>::load(p);
}
template <int W>
KBFGS_INLINE typename Simd<double, W>::V load_double(const float* p) {
  typedef float Half __attribute__((vector_size(W / 2)));
  Half v;
  __builtin_memcpy(&v, p, W / 2);
  return __builtin_convertvector(v, typename Simd<double, W>::V);
}

}  // namespace kbfgs
