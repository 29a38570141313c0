// The activation factor A <- decay*A + (1-decay)*X~'X~/m and the mean row a_bar.
//
// Per layer: X is read once for both column sums (m*d_in elements), then by the matrix product;
// m*n^2 FLOPs, half of a full product plus the blocks on the diagonal; A is read once and written
// once on and above the diagonal and written once below it. No n x n temporary.
#include "factor_ema.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "mirror.h"
#include "row_groups.h"

namespace kbfgs {

namespace {

// Columns of a block of the product, a multiple of the widest vectors. Wider blocks multiply more
// below the diagonal, narrower ones leave the BLAS less to work with. One thread, 1000 x 1000 floats,
// AMD Zen 4 with MKL: full product 26.0 ms; blocks of 64 columns 12.3, 96 12.0, 128 12.6, 192 13.0, 256
// 13.6, 512 16.4; the same order at 784 and 500 columns. Of fewer columns a quarter makes a block, which
// also gives threads something to share: 1000 x 128 takes 299 us in blocks of 96 and 32, 256 in four.
constexpr int64_t block_columns(int64_t cols) {
  return std::clamp<int64_t>((cols / 4 + 15) / 16 * 16, 32, 96);
}

struct SumsBody {
  // sum[j] += sum_i X[i][j], square[j] += sum_i X[i][j]^2 over `rows` rows.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* X, int64_t stride, int64_t rows, int64_t cols, T* sum, T* square) {
    using S = Simd<T, W>;
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

constexpr int64_t kWidenedRows = 256;  // 1 MB of float at 1000 columns

// Columns [begin, end) of X~ against themselves and all columns behind them: the rows [begin, end) of
// A on and right of the diagonal, (1); then the same below the diagonal.
template <typename T>
void update_block(const FactorEma<T>& f, double decay, int64_t begin, int64_t end) {
  const auto& [X, m, cols, stride, n] = f.rows;
  const double weight = (1 - decay) / static_cast<double>(m);
  const auto multiply = [&, cols = cols, n = n](const T* x, int64_t rows, int64_t ld, double keep) {
    const Matrix<T> left(x, rows, end - begin, ld), right(x, rows, cols - begin, ld);
    gemm(f.A + begin * n + begin, n, left.transposed(), right, weight, keep);
  };
  if (X.own()) {
    multiply(X.as_own() + begin, m, stride, decay);
  } else {
    // Widened exactly, some rows at a time: 5 % of the product's time. The column of a block is in
    // this way widened once per block left of it.
    const int64_t width = cols - begin;
    const std::unique_ptr<T[]> room(new T[std::min(kWidenedRows, m) * width]);
    for (int64_t row = 0; row < m; row += kWidenedRows) {
      const int64_t rows = std::min(kWidenedRows, m - row);
      widen_rows(f.rows, row, rows, begin, room.get());
      multiply(room.get(), rows, width, row == 0 ? decay : 1);
    }
  }
  if (n > cols) {  // the column of ones; its corner goes with the last block
    const T keep = static_cast<T>(decay), rest = static_cast<T>(1 - decay);
    for (int64_t i = begin; i < (end == cols ? n : end); ++i) {
      T& a = f.A[i * n + cols];
      a = (decay == 0 ? T{0} : keep * a) + rest * f.a_bar[i];
    }
  }
  vectorised<MirrorBody>(f.A, n, n, begin, end == cols ? n : end);
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
        const int64_t cols = rows[l].cols;
        std::fill(own, own + 2 * cols, T{0});
        by_widened_rows(rows[l], row, count, [&](const T* X, int64_t stride, int64_t some) {
          vectorised<SumsBody>(X, stride, some, cols, own, own + cols);
        });
      },
      [&](int64_t l, const T* partial, int64_t groups) {
        finite[l] = finish_sums(rows[l], partial, groups, layers[l].a_bar);
      });

  // Blocks of all layers are units: every product runs on one thread, threads never wait for each
  // other, and a block is mirrored while it is in the cache. The largest blocks go first.
  struct Block {
    size_t layer;
    int64_t begin, end, cost;
  };
  std::vector<Block> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (!ok || !finite[l] || layers[l].A == nullptr) continue;
    const int64_t cols = rows[l].cols;
    elements += rows[l].n * rows[l].n + rows[l].m * cols;
    const int64_t width = block_columns(cols);
    for (int64_t begin = 0; begin < cols; begin += width) {
      const int64_t end = std::min(begin + width, cols);
      blocks.push_back({l, begin, end, (cols - begin) * rows[l].m});
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) {
    return a.cost > b.cost;
  });
  parallel_units(static_cast<int64_t>(blocks.size()), elements, [&](int64_t unit) {
    const Block& block = blocks[unit];
    update_block(layers[block.layer], decay, block.begin, block.end);
  });
}

template void factor_ema(const std::vector<FactorEma<float>>&, double, bool);
template void factor_ema(const std::vector<FactorEma<double>>&, double, bool);

}  // namespace kbfgs
