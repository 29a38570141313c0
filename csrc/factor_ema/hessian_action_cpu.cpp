// y = X~'(X~ s)/m + lam*s, the damped activation factor of this minibatch times a vector.
//
// Per layer: X is read once (m*d_in elements), 4*m*d_in FLOPs: four rows at a time give their
// products t with s and are added to y with weights t while they are still in the L1 cache.
#include <algorithm>

#include "../common/simd.h"
#include "factor_ema.h"
#include "row_groups.h"

namespace kbfgs {

namespace {

// R rows x of X: t = x s + one, y += x't; returns the sum of t.
template <int W, int R, typename T>
KBFGS_INLINE T action_rows(const T* x, int64_t stride, int64_t cols, const T* s, T one, T* y) {
  using S = Simd<T, W>;
  typename S::V acc[R] = {};
  int64_t j = 0;
  for (; j + S::L <= cols; j += S::L) {
    const typename S::V v = S::load(s + j);
    for (int r = 0; r < R; ++r) acc[r] += S::load(x + r * stride + j) * v;
  }
  T t[R], total = 0;
  for (int r = 0; r < R; ++r) t[r] = S::sum(acc[r]) + one;
  for (; j < cols; ++j)
    for (int r = 0; r < R; ++r) t[r] += x[r * stride + j] * s[j];
  for (j = 0; j + S::L <= cols; j += S::L) {
    typename S::V v = S::load(y + j);
    for (int r = 0; r < R; ++r) v += S::load(x + r * stride + j) * t[r];
    S::store(y + j, v);
  }
  for (; j < cols; ++j)
    for (int r = 0; r < R; ++r) y[j] += x[r * stride + j] * t[r];
  for (int r = 0; r < R; ++r) total += t[r];
  return total;
}

struct ActionBody {
  // y[0, cols) += X'(X~ s) and y[cols] += 1'(X~ s) over `rows` rows; `one` is s of the ones column.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* X, int64_t stride, int64_t rows, int64_t cols, const T* s, T one, T* y) {
    T total = 0;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      total += action_rows<W, 4>(X + i * stride, stride, cols, s, one, y);
    for (; i < rows; ++i) total += action_rows<W, 1>(X + i * stride, stride, cols, s, one, y);
    y[cols] += total;
  }
};

}  // namespace

template <typename T>
void hessian_action(const std::vector<HessianAction<T>>& layers) {
  std::vector<Rows<T>> rows;
  for (const auto& h : layers) rows.push_back(h.rows);
  row_groups(
      rows, [&](int64_t l) { return rows[l].cols + 1; },
      [&](int64_t l, int64_t row, int64_t count, T* own) {
        const Rows<T>& r = rows[l];
        const T one = r.n > r.cols ? layers[l].s[r.cols] : T{0};
        std::fill(own, own + r.cols + 1, T{0});
        by_widened_rows(r, row, count, [&](const T* X, int64_t stride, int64_t some) {
          vectorised<ActionBody>(X, stride, some, r.cols, layers[l].s, one, own);
        });
      },
      [&](int64_t l, const T* partial, int64_t groups) {
        const T scale = static_cast<T>(1 / static_cast<double>(rows[l].m));
        const T lam = static_cast<T>(layers[l].lam);
        T* y = layers[l].y;
        std::copy(partial, partial + rows[l].n, y);
        for (int64_t g = 1; g < groups; ++g)
          for (int64_t j = 0; j < rows[l].n; ++j) y[j] += partial[g * (rows[l].cols + 1) + j];
        for (int64_t j = 0; j < rows[l].n; ++j) y[j] = y[j] * scale + lam * layers[l].s[j];
      });
}

template void hessian_action(const std::vector<HessianAction<float>>&);
template void hessian_action(const std::vector<HessianAction<double>>&);

}  // namespace kbfgs
