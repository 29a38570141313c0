// The gate (8) as one block computes it, and the rank-2 update (9) of rows.
#pragma once

#include "../common/device.cuh"
#include "../common/matvec.cuh"
#include "../double_damping/damping.cuh"

namespace kbfgs::cuda {

constexpr double kCurvatureGate = 1e-4;  // of (8), relative to s's*||c||: the authors' value

template <typename T>
struct Gate {
  bool accept;
  T rho;          // 1/s'y
  T coefficient;  // rho^2*y'Hy + rho
};

// (8) for one pair; all threads of the block take part and get the same answer. Sums are in double
// and rounded to T where the reference rounds, so that both overflow in the same place. Without Hy
// (a pair that is stored, not multiplied out) the pair itself must be finite. `room`: 5 doubles per
// warp.
template <typename T>
__device__ Gate<T> gate(
    int n, const T* s, const T* y, const T* Hy, const T* c, bool ok, double* room) {
  double sums[5] = {};
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const double s_j = s[j], y_j = y[j], c_j = c[j], third = Hy ? Hy[j] : y[j];
    sums[0] += s_j * y_j;
    sums[1] += s_j * s_j;
    sums[2] += c_j * c_j;
    sums[3] += y_j * third;
    sums[4] += third * third;
  }
  block_sum(sums, room);
  const T sy = static_cast<T>(sums[0]), ss = static_cast<T>(sums[1]);
  const T c_norm = static_cast<T>(sqrt(sums[2]));
  Gate<T> g{};
  g.rho = T(1) / sy;
  const T yHy = static_cast<T>(sums[3]);
  g.coefficient = g.rho * g.rho * yHy + g.rho;
  // Finite products imply finite vectors: 0 times Inf or NaN is NaN.
  const bool sound =
      Hy ? yHy >= 0 && finite(g.coefficient * ss) && finite(g.rho * static_cast<T>(sums[4]))
         : finite(ss) && finite(static_cast<T>(sums[4]));
  g.accept = ok && sound && finite(g.rho) && sy > T(0) &&
             sy > static_cast<T>(kCurvatureGate) * ss * c_norm;
  return g;
}

// One thread of the grid counts a layer's pair, unless the step is void.
template <typename T>
__device__ __forceinline__ void count(int64_t* counts, const Gate<T>& g, bool ok) {
  if (ok) counts[g.accept ? kAccepted : kRejected] += 1;
}

// (9) as H_ij + (s_i*w_j + w_i*s_j) with w = coefficient/2*s - rho*Hy. No product is fused into a
// sum, so that H_ij and H_ji come out the same to the last bit.
template <typename T>
struct Rank2 {
  const T* s;
  const T* Hy;
  T half;  // coefficient/2
  T rho;

  __device__ __forceinline__ T w(T s_j, T Hy_j) const {
    return product(half, s_j) - product(rho, Hy_j);
  }
  __device__ __forceinline__ T entry(T h, T s_i, T w_i, T s_j, T w_j) const {
    return h + (product(s_i, w_j) + product(w_i, s_j));
  }
};

// A row of H: read from `from` (memory or chip), written to `to`. One warp; what one round of the loop
// reads is loaded before anything is stored.
template <typename T>
__device__ __forceinline__ void update_row(
    const Rank2<T>& u, int n, int row, const T* from, T* to) {
  constexpr int kWidth = Pack<T>::kWidth;
  const T s_i = u.s[row], w_i = u.w(s_i, u.Hy[row]);
  int done = 0;
  if (aligned(from) && aligned(to) && aligned(u.s) && aligned(u.Hy)) {
    done = n / kWidth * kWidth;
    constexpr int kStride = kWarp * kWidth;
    const auto put = [&](int j, Pack<T>& h, const Pack<T>& s, const Pack<T>& Hy) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const T s_j = s.value[e];
        h.value[e] = u.entry(h.value[e], s_i, w_i, s_j, u.w(s_j, Hy.value[e]));
      }
      store_pack(to + j, h);
    };
    int j = lane_id() * kWidth;
    for (; j + (kPacksAtOnce - 1) * kStride < done; j += kPacksAtOnce * kStride) {
      Pack<T> h[kPacksAtOnce], s[kPacksAtOnce], Hy[kPacksAtOnce];
#pragma unroll
      for (int v = 0; v < kPacksAtOnce; ++v) {
        h[v] = load_pack(from + j + v * kStride);
        s[v] = load_pack(u.s + j + v * kStride);
        Hy[v] = load_pack(u.Hy + j + v * kStride);
      }
#pragma unroll
      for (int v = 0; v < kPacksAtOnce; ++v) put(j + v * kStride, h[v], s[v], Hy[v]);
    }
#pragma unroll 1
    for (; j < done; j += kStride) {
      Pack<T> h = load_pack(from + j);
      put(j, h, load_pack(u.s + j), load_pack(u.Hy + j));
    }
  }

  constexpr int kScalarsAtOnce = 4;
  int j = done + lane_id();
  for (; j + (kScalarsAtOnce - 1) * kWarp < n; j += kScalarsAtOnce * kWarp) {
    T h[kScalarsAtOnce], s[kScalarsAtOnce], Hy[kScalarsAtOnce];
#pragma unroll
    for (int v = 0; v < kScalarsAtOnce; ++v) {
      h[v] = from[j + v * kWarp];
      s[v] = u.s[j + v * kWarp];
      Hy[v] = u.Hy[j + v * kWarp];
    }
#pragma unroll
    for (int v = 0; v < kScalarsAtOnce; ++v) {
      to[j + v * kWarp] = u.entry(h[v], s_i, w_i, s[v], u.w(s[v], Hy[v]));
    }
  }
#pragma unroll 1
  for (; j < n; j += kWarp) {
    to[j] = u.entry(from[j], s_i, w_i, u.s[j], u.w(u.s[j], u.Hy[j]));
  }
}

// This block's rows of H, the first `kept` of them from the chip.
template <typename T>
__device__ __forceinline__ void update_rows(
    const Gate<T>& g, T* H, int n, RowShare share, const T* s, const T* Hy, const T* chip,
    int kept) {
  const Rank2<T> u{s, Hy, g.coefficient / 2, g.rho};
  const int pitch = padded<T>(n);
  for (int row = share.begin + warp_id(); row < share.end; row += warps_per_block()) {
    const int local = row - share.begin;
    T* to = H + static_cast<int64_t>(row) * n;
    update_row(u, n, row, local < kept ? chip + static_cast<int64_t>(local) * pitch : to, to);
  }
}

}  // namespace kbfgs::cuda
