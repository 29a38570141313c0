// Symmetric matrix times vector, reading the upper triangle once.
//
// Per matrix: n^2/2 elements read, 2 n^2 FLOPs. A plain product reads n^2 elements; on matrices that
// do not fit the L2 cache the bytes are what costs. The price is a vector of partial results per row
// panel, 1/32 of the bytes at n = 1000.
#include "symv.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "parallel.h"
#include "simd.h"

namespace kbfgs {

namespace {

constexpr int64_t kMostPanels = 16;

// Columns [j, n) of four rows against x and y: y[j] += sum_r x_r*h[r][j], sum[r] += h[r][j]*x[j].
template <int W, typename T>
KBFGS_INLINE int64_t four_rows(
    const T* h, int64_t ld, const T* x, T* y, int64_t j, int64_t n, const T* x_rows, T* sums) {
  using S = Simd<T, W>;
  typename S::V a0 = {}, a1 = {}, a2 = {}, a3 = {};
  const typename S::V x0 = S::all(x_rows[0]), x1 = S::all(x_rows[1]);
  const typename S::V x2 = S::all(x_rows[2]), x3 = S::all(x_rows[3]);
  for (; j + S::L <= n; j += S::L) {
    const typename S::V h0 = S::load(h + j), h1 = S::load(h + ld + j);
    const typename S::V h2 = S::load(h + 2 * ld + j), h3 = S::load(h + 3 * ld + j);
    const typename S::V x_j = S::load(x + j);
    a0 += h0 * x_j;
    a1 += h1 * x_j;
    a2 += h2 * x_j;
    a3 += h3 * x_j;
    S::store(y + j, S::load(y + j) + ((h0 * x0 + h1 * x1) + (h2 * x2 + h3 * x3)));
  }
  sums[0] += S::sum(a0);
  sums[1] += S::sum(a1);
  sums[2] += S::sum(a2);
  sums[3] += S::sum(a3);
  return j;
}

struct PanelBody {
  // y[begin, n) = the part of H x that rows [begin, end) of the upper triangle contribute.
  template <int W, typename T>
  static KBFGS_INLINE void run(
      const T* H, int64_t n, int64_t begin, int64_t end, const T* x, T* y) {
    for (int64_t j = begin; j < n; ++j) y[j] = 0;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const T* h = H + i * n;
      T sums[4] = {};
      for (int a = 0; a < 4; ++a) {  // the triangle on the diagonal
        sums[a] += h[a * n + i + a] * x[i + a];
        for (int b = a + 1; b < 4; ++b) {
          sums[a] += h[a * n + i + b] * x[i + b];
          sums[b] += h[a * n + i + b] * x[i + a];
        }
      }
      int64_t j = four_rows<W>(h, n, x, y, i + 4, n, x + i, sums);
      if constexpr (W > 32) j = four_rows<32>(h, n, x, y, j, n, x + i, sums);
      if constexpr (W > 16) j = four_rows<16>(h, n, x, y, j, n, x + i, sums);
      for (; j < n; ++j) {
        for (int a = 0; a < 4; ++a) {
          sums[a] += h[a * n + j] * x[j];
          y[j] += h[a * n + j] * x[i + a];
        }
      }
      for (int a = 0; a < 4; ++a) y[i + a] += sums[a];
    }
    for (; i < end; ++i) {  // at most three rows at the end of the matrix
      T sum = H[i * n + i] * x[i];
      for (int64_t j = i + 1; j < n; ++j) {
        sum += H[i * n + j] * x[j];
        y[j] += H[i * n + j] * x[i];
      }
      y[i] += sum;
    }
  }
};

struct SumBody {
  template <int W, typename T>
  static KBFGS_INLINE void run(T* y, const T* part, int64_t n) {
    using S = Simd<T, W>;
    int64_t j = 0;
    for (; j + S::L <= n; j += S::L) S::store(y + j, S::load(y + j) + S::load(part + j));
    for (; j < n; ++j) y[j] += part[j];
  }
};

}  // namespace

void append_panels(std::vector<Panel>& panels, int64_t task, int64_t n) {
  const int64_t wanted = (n * n / 2 + kGrainElements - 1) / kGrainElements;
  const int64_t count = std::clamp<int64_t>(wanted, 1, kMostPanels);
  int64_t begin = 0;
  for (int64_t k = 1; k <= count && begin < n; ++k) {
    // rows above `end` hold the share k/count of the triangle; multiples of 16, the widest vector
    const double left = std::sqrt(1.0 - static_cast<double>(k) / static_cast<double>(count));
    int64_t end = static_cast<int64_t>(static_cast<double>(n) * (1.0 - left)) / 16 * 16;
    if (k == count) end = n;
    if (end > begin) panels.push_back({task, begin, end});
    begin = std::max(begin, end);
  }
}

template <typename T>
void symv(const std::vector<Symv<T>>& tasks, const std::function<void(int64_t)>& done) {
  std::vector<Panel> panels;
  std::vector<int64_t> first;  // panels of task t are [first[t], first[t + 1])
  std::vector<int64_t> offset;  // of each panel's partial vector
  int64_t elements = 0, work = 0;
  for (int64_t t = 0; t < static_cast<int64_t>(tasks.size()); ++t) {
    first.push_back(static_cast<int64_t>(panels.size()));
    append_panels(panels, t, tasks[t].n);
    work += tasks[t].n * tasks[t].n / 2;
    for (size_t k = first.back(); k < panels.size(); ++k) {
      offset.push_back(elements);
      elements += tasks[t].n;
    }
  }
  first.push_back(static_cast<int64_t>(panels.size()));
  const std::unique_ptr<T[]> partial(new T[elements]);
  std::vector<std::atomic<int64_t>> left(tasks.size());
  for (size_t t = 0; t < tasks.size(); ++t) left[t] = first[t + 1] - first[t];

  parallel_units(static_cast<int64_t>(panels.size()), work, [&](int64_t unit) {
    const Panel& panel = panels[unit];
    const Symv<T>& task = tasks[panel.task];
    vectorised<PanelBody>(
        task.H, task.n, panel.begin, panel.end, task.x, partial.get() + offset[unit]);
    if (left[panel.task].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    // The last panel of the task: add the partial vectors, always in the same order.
    const int64_t k0 = first[panel.task];
    const T* part = partial.get() + offset[k0];
    std::copy(part, part + task.n, task.y);
    for (int64_t k = k0 + 1; k < first[panel.task + 1]; ++k) {
      const int64_t b = panels[k].begin;
      const T* more = partial.get() + offset[k] + b;
      vectorised<SumBody>(task.y + b, more, task.n - b);
    }
    done(panel.task);
  });
}

template void symv(const std::vector<Symv<float>>&, const std::function<void(int64_t)>&);
template void symv(const std::vector<Symv<double>>&, const std::function<void(int64_t)>&);

}  // namespace kbfgs
