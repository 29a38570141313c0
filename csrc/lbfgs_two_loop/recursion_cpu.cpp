// out = H Q by the two-loop recursion (11), H_0 = I, for a matrix or a vector.
//
// Columns are independent. A tile of 64 bytes * 4 of columns of all rows (n*64 floats, 256 KB at
// n = 1000) is packed into a buffer of one thread and stays in its L2 cache through all sweeps; S and
// Y stream past it. Each of the 2f + 1 sweeps (f pairs filled) applies one pair and takes the next
// pair's dot products in the same pass: 8*f*n*columns FLOPs, S and Y read twice per tile.
#include <algorithm>
#include <memory>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "lbfgs_two_loop.h"

namespace kbfgs {

namespace {

constexpr int64_t kTileBytes = 256;  // of one packed row: four of the widest vectors

struct SweepBody {
  // q_i += u_i*a and dots = sum_i v_i*q_i over the rows of a packed tile; u or v may be null.
  template <int W, typename T>
  static KBFGS_INLINE void run(T* q, int64_t n, const T* u, const T* a, const T* v, T* dots) {
    using S = Simd<T, W>;
    constexpr int64_t kTile = kTileBytes / sizeof(T);
    for (int64_t col = 0; col < kTile; col += 4 * S::L) {
      typename S::V acc[4] = {}, weight[4] = {};
      if (u != nullptr)
        for (int k = 0; k < 4; ++k) weight[k] = S::load(a + col + k * S::L);
      for (int64_t i = 0; i < n; ++i) {
        T* row = q + i * kTile + col;
        const T u_i = u != nullptr ? u[i] : T{0}, v_i = v != nullptr ? v[i] : T{0};
        for (int k = 0; k < 4; ++k) {
          const typename S::V x = S::load(row + k * S::L) + weight[k] * u_i;
          S::store(row + k * S::L, x);
          acc[k] += x * v_i;
        }
      }
      for (int k = 0; k < 4; ++k) S::store(dots + col + k * S::L, acc[k]);
    }
  }
};

struct VectorSweepBody {
  // q += a*u and *dot = v'q for one vector; u or v may be null.
  template <int W, typename T>
  static KBFGS_INLINE void run(T* q, int64_t n, const T* u, T a, const T* v, T* dot) {
    using S = Simd<T, W>;
    if (u == nullptr) u = q, a = T{0};
    if (v == nullptr) v = q;
    typename S::V acc[4] = {};
    int64_t i = 0;
    for (; i + 4 * S::L <= n; i += 4 * S::L) {
      for (int k = 0; k < 4; ++k) {
        const typename S::V x = S::load(q + i + k * S::L) + S::load(u + i + k * S::L) * a;
        S::store(q + i + k * S::L, x);
        acc[k] += x * S::load(v + i + k * S::L);
      }
    }
    for (; i + S::L <= n; i += S::L) {
      const typename S::V x = S::load(q + i) + S::load(u + i) * a;
      S::store(q + i, x);
      acc[0] += x * S::load(v + i);
    }
    T total = S::sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; i < n; ++i) {
      q[i] += a * u[i];
      total += q[i] * v[i];
    }
    *dot = total;
  }
};

template <typename T>
struct Tile {
  static constexpr int64_t kColumns = kTileBytes / sizeof(T);

  T* q;
  int64_t n;
  void sweep(const T* u, const T* a, const T* v, T* dots) const {
    vectorised<SweepBody>(q, n, u, a, v, dots);
  }
};

template <typename T>
struct Vector {
  static constexpr int64_t kColumns = 1;

  T* q;
  int64_t n;
  void sweep(const T* u, const T* a, const T* v, T* dots) const {
    vectorised<VectorSweepBody>(q, n, u, u != nullptr ? *a : T{0}, v, dots);
  }
};

// The recursion on columns packed as `Columns` holds them. alpha: filled x kColumns.
template <typename T, class Columns>
void run_recursion(const Ring<T>& ring, const Columns& columns, T* alpha) {
  constexpr int64_t C = Columns::kColumns;
  const int64_t f = ring.filled();
  T dots[C], weight[C];
  const T* u = nullptr;  // the vector of the update that is still to be applied
  for (int64_t k = f - 1; k >= 0; --k) {  // newest to oldest
    const int64_t row = ring.row(k);
    columns.sweep(u, weight, ring.S + row * ring.n, dots);
    for (int64_t c = 0; c < C; ++c) {
      alpha[k * C + c] = ring.rho[row] * dots[c];
      weight[c] = -alpha[k * C + c];
    }
    u = ring.Y + row * ring.n;
  }
  for (int64_t k = 0; k < f; ++k) {  // oldest to newest
    const int64_t row = ring.row(k);
    columns.sweep(u, weight, ring.Y + row * ring.n, dots);
    for (int64_t c = 0; c < C; ++c) weight[c] = alpha[k * C + c] - ring.rho[row] * dots[c];
    u = ring.S + row * ring.n;
  }
  if (u != nullptr) columns.sweep(u, weight, static_cast<const T*>(nullptr), dots);
}

template <typename T>
void run_tile(const TwoLoop<T>& l, int64_t begin) {
  constexpr int64_t C = Tile<T>::kColumns;
  const int64_t n = l.ring.n, width = std::min(C, l.columns - begin);
  const std::unique_ptr<T[]> memory(new T[(n + l.ring.filled()) * C]);
  T* q = memory.get();
  for (int64_t i = 0; i < n; ++i) {
    const T* from = l.Q + i * l.Q_stride + begin;
    std::copy(from, from + width, q + i * C);
    std::fill(q + i * C + width, q + (i + 1) * C, T{0});
  }
  run_recursion(l.ring, Tile<T>{q, n}, q + n * C);
  for (int64_t i = 0; i < n; ++i)
    std::copy(q + i * C, q + i * C + width, l.out + i * l.columns + begin);
}

template <typename T>
void run_vector(const TwoLoop<T>& l) {
  const std::unique_ptr<T[]> alpha(new T[l.ring.filled()]);
  for (int64_t i = 0; i < l.ring.n; ++i) l.out[i] = l.Q[i * l.Q_stride];
  run_recursion(l.ring, Vector<T>{l.out, l.ring.n}, alpha.get());
}

}  // namespace

template <typename T>
void recursion(const std::vector<TwoLoop<T>>& layers) {
  struct Unit {
    size_t layer;
    int64_t begin;
  };
  std::vector<Unit> units;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    elements += 2 * layers[l].ring.filled() * layers[l].ring.n * layers[l].columns;
    for (int64_t c = 0; c < layers[l].columns; c += Tile<T>::kColumns) units.push_back({l, c});
  }
  parallel_units(static_cast<int64_t>(units.size()), elements, [&](int64_t unit) {
    const TwoLoop<T>& layer = layers[units[unit].layer];
    if (layer.columns == 1)
      run_vector(layer);
    else
      run_tile(layer, units[unit].begin);
  });
}

template void recursion(const std::vector<TwoLoop<float>>&);
template void recursion(const std::vector<TwoLoop<double>>&);

}  // namespace kbfgs
