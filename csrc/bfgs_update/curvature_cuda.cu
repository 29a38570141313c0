// The whole curvature update of a step, (5) to (10), for all layers in one cooperative launch.
//
//   phase      activation side                 gradient side
//   1          s = H_a a_bar                   y averaged (5), Hy = H_g y
//   2          y = A s + lam s                 damping (6), (7); Hy = H_g y where (7) changed y
//   3          Hy = H_a y                      -
//   4          gate (8), H_a updated (9)       gate (8), H_g updated (9)
//
// with a grid barrier between phases: 3 with both sides, 2 for the gradient side alone; with X in
// place of A phase 2 is two steps (z = X~ s, y = X~'z/m + lam s), 4 barriers.
//
// Blocks have equal parts of the rows of all factors, the same in all phases. Phase 1 leaves a block's
// rows in its shared memory as far as they fit, so phases 2 to 4 read only what did not fit: per
// factor of n rows n^2 elements read and n^2 written, plus the A (or X) of its layer read once. What
// does not fit is read up to three times. FLOPs: 2 n^2 per product, 4 n^2 for (9).
//
// Nothing but scalars of the pair is decided per layer, and every block that has rows of a layer
// decides it again for itself from the same numbers in the same order: no barrier is spent on it.
#include <algorithm>

#include "../common/matvec.cuh"
#include "../double_damping/damping.cuh"
#include "../factor_ema/hessian_action.cuh"
#include "bfgs_update_cuda.h"
#include "gate.cuh"

namespace kbfgs::cuda {

namespace {

struct CurvatureShape {
  // 16 warps of two rows each: 32 KB of loads in flight (matvec.cuh). One block per multiprocessor,
  // since its shared memory holds the factors' rows; 128 registers per thread are then free to use.
  static constexpr int kThreads = 512;
  // 5 doubles per warp for the gate's sums; the column tiles need 32 elements per warp.
  static constexpr int kRoomBytes = kThreads / kWarp * kWarp * int(sizeof(double));
};

template <typename T>
struct CurvatureTable {
  CurvatureLayer<T> layer[kLayersPerLaunch];
  int layers;
  int column_tiles;
  int64_t part;    // of the elements of all factors, per block
  int64_t part_x;  // of the elements of all X
  int chip;         // elements of shared memory for rows
  bool a_side, g_side, from_X;
  T decay, rest;  // of (5)
  double mu1;
  const bool* ok;
  const bool* ok_pair;
};

// A block's rows of one factor, and where it keeps them.
template <typename T>
struct Part {
  RowShare share;
  T* chip;
  int kept;  // rows on chip
  __device__ __forceinline__ bool first() const { return share.begin == 0; }
};

// The parts of this block, layer after layer: the same in every phase.
template <typename T>
class Parts {
 public:
  __device__ explicit Parts(const CurvatureTable<T>& table)
      : place_(reinterpret_cast<T*>(shared_memory() + CurvatureShape::kRoomBytes)),
        left_(table.chip),
        part_(table.part) {}

  __device__ __forceinline__ Part<T> next(int n, int64_t before) {
    Part<T> part{row_share(n, n, before, part_), place_, 0};
    const int rows = part.share.end - part.share.begin;
    if (rows > 0) {
      const int pitch = padded<T>(n);
      part.kept = min(rows, left_ / pitch);
      if (part.kept < rows) part.kept -= part.kept % kRowsAtOnce;  // rows are kept in groups
      place_ += part.kept * pitch;
      left_ -= part.kept * pitch;
    }
    return part;
  }

 private:
  T* place_;
  int left_;
  int64_t part_;
};

template <typename T, typename A, typename G>
__device__ __forceinline__ void for_each_part(
    const CurvatureTable<T>& t, const A& activation, const G& gradient) {
  Parts<T> parts(t);
  for (int i = 0; i < t.layers; ++i) {
    const CurvatureLayer<T>& l = t.layer[i];
    if (t.a_side) {
      const Part<T> part = parts.next(l.n_a, l.before_a);
      if (part.share.begin < part.share.end) activation(l, part);
    }
    if (t.g_side) {
      const Part<T> part = parts.next(l.n_g, l.before_g);
      if (part.share.begin < part.share.end) gradient(l, part);
    }
  }
}

// Phase 1, gradient side.
template <typename T>
__device__ void average_and_multiply(
    const CurvatureTable<T>& t, const CurvatureLayer<T>& l, const Part<T>& part, double* room) {
  const int n = l.n_g;
  Averaged<T, Change> s{l.s, {l.h_change}, t.decay, t.rest, true};
  Averaged<T, Difference> y{l.y, {l.g_bar, l.g_next}, t.decay, t.rest, true};
  double bad[2] = {};  // means, and averages, that are not finite
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    bad[0] += !(finite(l.h_change[j]) && finite(l.g_bar[j]) && finite(l.g_next[j]));
    bad[1] += !(finite(s(j)) && finite(y(j)));
  }
  block_sum(bad, room);
  const bool fine = flag(t.ok_pair) && bad[0] == 0;
  if (part.first() && threadIdx.x == 0) l.fresh[3 * n] = T(fine);
  if (!fine) return;
  s.keep = y.keep = bad[1] == 0;
  for (int j = part.share.begin + int(threadIdx.x); j < part.share.end; j += blockDim.x) {
    l.fresh[j] = s(j);
    l.fresh[n + j] = y(j);
  }
  T* Hy = l.fresh + 2 * n;
  matvec_rows<T>(
      l.H_g, n, n, part.share, y, part.chip, part.kept, true,
      [&](int row, T dot) { Hy[row] = dot; });
}

// Phase 2, gradient side.
template <typename T>
__device__ void damp_and_multiply(
    const CurvatureTable<T>& t, const CurvatureLayer<T>& l, const Part<T>& part, double* room) {
  const int n = l.n_g;
  if (l.fresh[3 * n] == T(0)) return;
  const T *s = l.fresh, *y = l.fresh + n, *Hy = l.fresh + 2 * n;
  const Damped<T> damped = damping(n, s, y, Hy, t.mu1, *l.lam_g, room);
  if (part.first() && threadIdx.x == 0) {
    l.counts_g[kPowell] += damped.powell;
    l.counts_g[kLm] += damped.lm;
  }
  for (int j = part.share.begin + int(threadIdx.x); j < part.share.end; j += blockDim.x) {
    l.s[j] = s[j];  // nobody reads the old averages any more
    l.y[j] = y[j];
    l.work_g[j] = damped.s_at(j);
    l.work_g[n + j] = damped(j);
    if (!damped.lm) l.work_g[2 * n + j] = Hy[j];
  }
  if (!damped.lm) return;
  T* Hy_damped = l.work_g + 2 * n;
  matvec_rows<T>(
      l.H_g, n, n, part.share, damped, part.chip, part.kept, false,
      [&](int row, T dot) { Hy_damped[row] = dot; });
}

// Phase 4, either side: `pair` holds s, y and H y.
template <typename T>
__device__ void gate_and_update(
    T* H, int n, const T* pair, const T* c, int64_t* counts, bool ok, const Part<T>& part,
    double* room) {
  const T *s = pair, *y = pair + n, *Hy = pair + 2 * n;
  const Gate<T> g = gate(n, s, y, Hy, c, ok, room);
  if (part.first() && threadIdx.x == 0) count(counts, g, ok);
  if (g.accept) update_rows(g, H, n, part.share, s, Hy, part.chip, part.kept);
}

template <typename T>
__device__ void minibatch_action(const CurvatureTable<T>& t, T* room) {
  for (int i = 0; i < t.layers; ++i) {
    const CurvatureLayer<T>& l = t.layer[i];
    l.X.visit([&](const auto* X) {
      rows_times_vector(X, l.ld, l.m, l.d_in, l.n_a, l.work_a, l.z, l.before_x, t.part_x);
    });
  }
  grid_sync();
  int i = 0;
  for (int tile = blockIdx.x; tile < t.column_tiles; tile += gridDim.x) {
    while (i + 1 < t.layers && t.layer[i + 1].tiles_before <= tile) ++i;
    const CurvatureLayer<T>& l = t.layer[i];
    const T lam = static_cast<T>(*l.lam_a);
    l.X.visit([&](const auto* X) {
      columns_times_vector(
          X, l.ld, l.m, l.inverse_m, l.d_in, l.n_a, l.z, l.work_a, lam, l.work_a + l.n_a,
          tile - l.tiles_before, room);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(CurvatureShape::kThreads, 1)
    curvature_kernel(const __grid_constant__ CurvatureTable<T> t) {
  double* room = reinterpret_cast<double*>(shared_memory());
  const bool ok = flag(t.ok);  // the same for all blocks: none leaves before a barrier

  for_each_part(
      t,
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        T* s = l.work_a;
        matvec_rows<T>(
            l.H_a, l.n_a, l.n_a, part.share, Plain<T>{l.a_bar}, part.chip, part.kept, true,
            [&](int row, T dot) { s[row] = dot; });
      },
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        average_and_multiply(t, l, part, room);
      });
  grid_sync();

  for_each_part(
      t,
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        if (t.from_X) return;
        const T* s = l.work_a;
        T* y = l.work_a + l.n_a;
        const T lam = static_cast<T>(*l.lam_a);
        matvec_rows<T>(
            l.A, l.n_a, l.n_a, part.share, Plain<T>{s}, nullptr, 0, false,
            [&](int row, T dot) { y[row] = dot + lam * s[row]; });
      },
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        damp_and_multiply(t, l, part, room);
      });
  if (t.from_X) minibatch_action(t, reinterpret_cast<T*>(room));
  grid_sync();

  if (t.a_side) {
    for_each_part(
        t,
        [&](const CurvatureLayer<T>& l, const Part<T>& part) {
          T* Hy = l.work_a + 2 * l.n_a;
          matvec_rows<T>(
              l.H_a, l.n_a, l.n_a, part.share, Plain<T>{l.work_a + l.n_a}, part.chip, part.kept,
              false, [&](int row, T dot) { Hy[row] = dot; });
        },
        [&](const CurvatureLayer<T>&, const Part<T>&) {});
    grid_sync();
  }

  for_each_part(
      t,
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        gate_and_update(l.H_a, l.n_a, l.work_a, l.a_bar, l.counts_a, ok, part, room);
      },
      [&](const CurvatureLayer<T>& l, const Part<T>& part) {
        if (l.fresh[3 * l.n_g] == T(0)) return;
        gate_and_update(l.H_g, l.n_g, l.work_g, l.g_bar, l.counts_g, true, part, room);
      });
}

template <typename T>
void launch_part(CurvatureTable<T>& t, cudaStream_t stream) {
  int64_t total = 0, total_x = 0;
  t.column_tiles = 0;
  int widest = 0;
  for (int i = 0; i < t.layers; ++i) {
    CurvatureLayer<T>& l = t.layer[i];
    l.before_a = total;
    l.before_g = l.before_a + int64_t(l.n_a) * l.n_a;
    total = l.before_g + int64_t(l.n_g) * l.n_g;
    l.before_x = total_x;
    l.tiles_before = t.column_tiles;
    if (t.from_X) {
      l.inverse_m = T(1) / T(l.m);
      total_x += int64_t(l.m) * (l.d_in + 1);
      t.column_tiles += column_tiles(l.n_a);
    }
    widest = std::max({widest, l.n_a, l.n_g});
  }
  if (total == 0) return;
  const DeviceLimits limits = device_limits();
  // No more blocks than there is work for: 64 KB of factors and X for each. A small model stays small,
  // but for a large batch.
  const int64_t worth = ((total + total_x) * int64_t(sizeof(T)) + 65535) / 65536;
  const int64_t blocks = std::min<int64_t>(limits.multiprocessors, worth);
  // A block's part and the row it may begin, each row padded to 16 bytes; or all there is.
  const int64_t wanted = (equal_part(total, blocks) + widest) * int64_t(sizeof(T)) * 9 / 8 + 1024;
  const int64_t bytes =
      std::min<int64_t>(limits.shared_bytes, CurvatureShape::kRoomBytes + wanted) / 16 * 16;
  t.chip = int((bytes - CurvatureShape::kRoomBytes) / int64_t(sizeof(T)));
  t.part = equal_part(total, blocks);
  t.part_x = equal_part(total_x, blocks);
  launch(
      &curvature_kernel<T>,
      {unsigned(blocks), CurvatureShape::kThreads, unsigned(bytes), true}, stream, t);
}

}  // namespace

template <typename T>
void curvature_update(
    std::vector<CurvatureLayer<T>> layers, double pair_decay, double mu1, const bool* ok,
    const bool* ok_pair, cudaStream_t stream) {
  CurvatureTable<T> t{};
  t.decay = static_cast<T>(pair_decay);
  t.rest = static_cast<T>(1 - pair_decay);
  t.mu1 = mu1;
  t.ok = ok;
  t.ok_pair = ok_pair;
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    std::copy_n(layers.begin() + begin, t.layers, t.layer);
    t.a_side = t.layer[0].H_a != nullptr;
    t.g_side = t.layer[0].H_g != nullptr;
    t.from_X = t.a_side && t.layer[0].A == nullptr;
    launch_part(t, stream);
  }
}

template void curvature_update<float>(
    std::vector<CurvatureLayer<float>>, double, double, const bool*, const bool*, cudaStream_t);
template void curvature_update<double>(
    std::vector<CurvatureLayer<double>>, double, double, const bool*, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
