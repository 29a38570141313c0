// The activation factor A <- decay*A + (1-decay)*X~'X~/m and the mean row a_bar.
//
// Per layer: X is read once for both column sums (m*d_in elements), then by the matrix product;
// m*n^2 FLOPs, half of a full product plus the blocks on the diagonal; A is read once and written
// once on and above the diagonal and written once below it. No n x n temporary.
#include "factor_ema.h"

#include <algorithm>
#include <cmath>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "../common/symmetric_tiles.h"
#include "../common/symv.h"
#include "row_groups.h"

namespace kbfgs {

namespace {

// Width of a block of columns in the product. Wider blocks multiply more below the diagonal,
// narrower ones give the BLAS less to work with.
constexpr int64_t kBlockColumns = 192;

struct SumsBody {
  // sum[j] = sum_i X[i][j], square[j] = sum_i X[i][j]^2 over `rows` rows.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* X, int64_t stride, int64_t rows, int64_t cols, T* sum, T* square) {
    using S = Simd<T, W>;
    for (int64_t j = 0; j < cols; ++j) sum[j] = square[j] = 0;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      const T* x = X + i * stride;
      int64_t j = 0;
      for (; j + S::L <= cols; j += S::L) {
        const typename S::V a = S::load(x + j), b = S::load(x + stride + j);
        const typename S::V c = S::load(x + 2 * stride + j), d = S::load(x + 3 * stride + j);
        S::store(sum + j, S::load(sum + j) + ((a + b) + (c + d)));
        S::store(square + j, S::load(square + j) + ((a * a + b * b) + (c * c + d * d)));
      }
      for (; j < cols; ++j) {
        for (int64_t r = 0; r < 4; ++r) {
          const T v = x[r * stride + j];
          sum[j] += v;
          square[j] += v * v;
        }
      }
    }
    for (; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const T v = X[i * stride + j];
        sum[j] += v;
        square[j] += v * v;
      }
    }
  }
};

// a_bar from the groups' sums; whether all mean squares are finite.
template <typename T>
bool finish_sums(const Rows<T>& rows, const T* partial, int64_t groups, T* a_bar) {
  bool finite = true;
  for (int64_t j = 0; j < rows.cols; ++j) {
    double sum = 0, square = 0;
    for (int64_t g = 0; g < groups; ++g) {
      sum += static_cast<double>(partial[2 * g * rows.cols + j]);
      square += static_cast<double>(partial[(2 * g + 1) * rows.cols + j]);
    }
    a_bar[j] = static_cast<T>(sum / static_cast<double>(rows.m));
    // Cauchy-Schwarz: a finite diagonal of X~'X~ bounds every entry.
    finite = finite && std::isfinite(static_cast<T>(square));
  }
  if (rows.n > rows.cols) a_bar[rows.cols] = 1;
  return finite;
}

struct MirrorBody {
  struct Keep {
    template <int W, typename V>
    KBFGS_INLINE V row(int64_t, int64_t, V v) const {
      return v;
    }
    template <typename T>
    KBFGS_INLINE T entry(int64_t, int64_t, T x) const {
      return x;
    }
  };
  template <int W, typename T>
  static KBFGS_INLINE void run(T* A, int64_t ld, int64_t n, int64_t begin, int64_t end) {
    symmetric_tiles<W>(A, ld, n, begin, end, Keep());
  }
};

template <typename T>
void update(const FactorEma<T>& f, double decay) {
  const auto& [X, m, cols, stride, n] = f.rows;
  const double weight = (1 - decay) / static_cast<double>(m);
  for (int64_t j = 0; j < cols; j += kBlockColumns) {  // blocks on and above the diagonal: (1)
    const int64_t width = std::min(kBlockColumns, cols - j);
    const Matrix<T> left(X + j, m, width, stride), right(X + j, m, cols - j, stride);
    gemm(f.A + j * n + j, n, left.transposed(), right, weight, decay);
  }
  if (n > cols) {  // the column of ones
    const T keep = static_cast<T>(decay), rest = static_cast<T>(1 - decay);
    for (int64_t j = 0; j < n; ++j) {
      T& a = f.A[j * n + cols];
      a = (decay == 0 ? T{0} : keep * a) + rest * f.a_bar[j];
    }
  }
  std::vector<Panel> panels;
  append_panels(panels, 0, n);
  parallel_units(static_cast<int64_t>(panels.size()), [&](int64_t unit) {
    vectorised<MirrorBody>(f.A, n, n, panels[unit].begin, panels[unit].end);
  });
}

}  // namespace

template <typename T>
void factor_ema(const std::vector<FactorEma<T>>& layers, double decay, bool ok) {
  std::vector<Rows<T>> rows;
  for (const auto& f : layers) rows.push_back(f.rows);
  std::vector<int64_t> finite(layers.size(), 0);  // not bool: written in parallel
  row_groups(
      rows, [&](int64_t l) { return 2 * rows[l].cols; },
      [&](int64_t l, int64_t row, int64_t count, T* own) {
        const Rows<T>& r = rows[l];
        vectorised<SumsBody>(
            r.X + row * r.stride, r.stride, count, r.cols, own, own + r.cols);
      },
      [&](int64_t l, const T* partial, int64_t groups) {
        finite[l] = finish_sums(rows[l], partial, groups, layers[l].a_bar);
      });
  for (size_t l = 0; l < layers.size(); ++l)
    if (ok && finite[l] && layers[l].A != nullptr) update(layers[l], decay);
}

template void factor_ema(const std::vector<FactorEma<float>>&, double, bool);
template void factor_ema(const std::vector<FactorEma<double>>&, double, bool);

}  // namespace kbfgs
