// Rows of numbers that may be 16-bit, widened piece by piece for kernels that work on T. What is T
// already is used where it lies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "simd.h"

namespace kbfgs {

constexpr int64_t kPiece = 1024;  // numbers at a time: 4 KB of float on the stack

// 16-bit numbers and floats as vectors of words of the same length.
template <int W>
struct Words {
  using F = typename Simd<float, W>::V;
  using U = typename Simd<uint32_t, W>::V;
  using I = typename Simd<int32_t, W>::V;
  using H = typename Simd<uint16_t, W / 2>::V;
  static constexpr int L = W / 4;

  static KBFGS_INLINE U load(const void* p) {
    H h;
    __builtin_memcpy(&h, p, W / 2);
    return __builtin_convertvector(h, U);
  }
  static KBFGS_INLINE void store(void* p, U u) {
    const H h = __builtin_convertvector(u, H);
    __builtin_memcpy(p, &h, W / 2);
  }
  static KBFGS_INLINE U bits(F x) { return reinterpret_cast<U>(x); }
  static KBFGS_INLINE F floats(U x) { return reinterpret_cast<F>(x); }

  // As the scalar functions of numbers.h, without their branches.
  static KBFGS_INLINE F widened(U u, Bfloat16) { return floats(u << 16); }
  static KBFGS_INLINE F widened(U u, Half) {
    const U rest = u & 0x7fff;
    const F least = __builtin_convertvector(reinterpret_cast<I>(rest), F) * 5.9604644775390625e-8f;
    const U whole = (rest << 13) + (112u << 23);
    U found = rest < 0x400 ? bits(least) : whole;
    found = rest < 0x7c00 ? found : whole + (112u << 23);
    return floats(found | (u & 0x8000) << 16);
  }
  static KBFGS_INLINE U rounded(F x, Bfloat16) {
    const U u = bits(x);
    return (u & 0x7fffffff) > 0x7f800000 ? U{} + 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  static KBFGS_INLINE U rounded(F x, Half) {
    const U u = bits(x), size = u & 0x7fffffff;
    U found = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    found = size < 0x38800000 ? bits(floats(size) + 0.5f) - 0x3f000000 : found;
    found = size < 0x477ff000 ? found : U{} + 0x7c00;
    found = size > 0x7f800000 ? U{} + 0x7e00 : found;
    return found | (u >> 16 & 0x8000);
  }
};

struct WidenBody {
  template <int W, typename H>
  static KBFGS_INLINE void run(const H* from, float* to, int64_t n) {
    using V = Words<W>;
    int64_t i = 0;
    for (; i + V::L <= n; i += V::L)
      Simd<float, W>::store(to + i, V::widened(V::load(from + i), H{}));
    for (; i < n; ++i) to[i] = widened(from[i]);
  }
};

struct RoundBody {
  template <int W, typename H>
  static KBFGS_INLINE void run(const float* from, H* to, int64_t n) {
    using V = Words<W>;
    int64_t i = 0;
    for (; i + V::L <= n; i += V::L)
      V::store(to + i, V::rounded(Simd<float, W>::load(from + i), H{}));
    for (; i < n; ++i) round_to(to[i], from[i]);
  }
};

// to[k] = from[at + k], widened
template <typename T>
void widen(const Numbers<T>& from, int64_t at, int64_t n, T* to) {
  from.visit([&](auto* p) {
    if constexpr (std::is_same_v<decltype(p), T*>)
      std::copy(p + at, p + at + n, to);
    else
      vectorised<WidenBody>(const_cast<const std::remove_pointer_t<decltype(p)>*>(p + at), to, n);
  });
}

// to[at + k] = from[k], rounded
template <typename T>
void round(const T* from, const Numbers<T>& to, int64_t at, int64_t n) {
  to.visit([&](auto* p) {
    if constexpr (std::is_same_v<decltype(p), T*>)
      std::copy(from, from + n, p + at);
    else
      vectorised<RoundBody>(from, p + at, n);
  });
}

// Numbers as T, a piece of at most kPiece at a time unless they are T.
template <typename T>
class Piece {
 public:
  const T* read(const Numbers<T>& from, int64_t at, int64_t n) {
    if (from.own()) return from.as_own() + at;
    widen(from, at, n, room_);
    return room_;
  }
  // The same to change them; `write` puts them back.
  T* change(const Numbers<T>& numbers, int64_t at, int64_t n) {
    return const_cast<T*>(read(numbers, at, n));
  }
  void write(const Numbers<T>& numbers, int64_t at, int64_t n) {
    if (!numbers.own()) round(static_cast<const T*>(room_), numbers, at, n);
  }

 private:
  alignas(64) T room_[kPiece];
};

// body(first, count) for a row of n numbers: in one piece where all are T.
template <class Body>
void by_pieces(int64_t n, bool own, const Body& body) {
  if (own) return body(int64_t{0}, n);
  for (int64_t at = 0; at < n; at += kPiece) body(at, std::min(kPiece, n - at));
}

}  // namespace kbfgs
