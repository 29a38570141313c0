// The lower triangle of a matrix from its upper one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common/simd.h"

namespace kbfgs {

// Exchanges the off-diagonal blocks of size H of the L x L tile in registers r.
template <int H, int L, typename V, size_t... I>
KBFGS_INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(a, b, static_cast<int>(I & H ? L + I - H : I)...);
  const V high = __builtin_shufflevector(a, b, static_cast<int>(I & H ? L + I : I + H)...);
#else
  V low, high;
  ((low[I] = I & H ? b[(I - H) % L] : a[I], high[I] = I & H ? b[I] : a[(I + H) % L]), ...);
#endif
  a = low;
  b = high;
}

template <int L, int H, typename V>
KBFGS_INLINE void transpose(V (&r)[L]) {
  if constexpr (H > 0) {
    for (int i = 0; i < L; ++i)
      if (!(i & H)) exchange<H, L>(r[i], r[i + H], std::make_index_sequence<L>());
    transpose<L, H / 2>(r);
  }
}

// The tile on the diagonal: its own upper half mirrored in registers.
template <int L, typename V, typename I>
KBFGS_INLINE void symmetrise(V (&r)[L], const I& lane) {
  V t[L];
  for (int i = 0; i < L; ++i) t[i] = r[i];
  transpose<L, L / 2>(t);
  for (int i = 0; i < L; ++i) r[i] = lane >= i ? r[i] : t[i];
}

// A[j][i] = A[i][j] for j > i, i in [begin, end); A is n x n, begin a multiple of the lanes. Tiles of
// L x L entries are turned in registers.
struct MirrorBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* A, int64_t ld, int64_t n, int64_t begin, int64_t end) {
    using S = Simd<T, W>;
    constexpr int L = S::L;
    constexpr int64_t kBlock = 64;  // 2 x 64 x 64 entries stay in the L1 cache between tiles
    using Lane = decltype(typename S::V{} < typename S::V{});
    Lane lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    const int64_t whole = n / L * L;
    for (int64_t row = begin; row < std::min(end, whole); row += kBlock) {
      const int64_t row_end = std::min({row + kBlock, end, whole});
      for (int64_t col = row; col < whole; col += kBlock) {
        const int64_t col_end = std::min(col + kBlock, whole);
        for (int64_t i = row; i < row_end; i += L) {
          for (int64_t j = std::max(i, col); j < col_end; j += L) {
            typename S::V r[L];
            for (int k = 0; k < L; ++k) r[k] = S::load(A + (i + k) * ld + j);
            if (i == j)
              symmetrise<L>(r, lane);
            else
              transpose<L, L / 2>(r);
            for (int k = 0; k < L; ++k) S::store(A + (j + k) * ld + i, r[k]);
          }
        }
      }
    }
    for (int64_t i = begin; i < end; ++i)  // fewer than L columns at the right edge
      for (int64_t j = std::max(i + 1, whole); j < n; ++j) A[j * ld + i] = A[i * ld + j];
  }
};

}  // namespace kbfgs
