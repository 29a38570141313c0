// Averaging (5) and the two dampings (6), (7) as one block computes them. Sums are in double and the
// decisions too; every block that computes them for a layer gets the same bits.
#pragma once

#include "../common/device.cuh"

namespace kbfgs::cuda {

enum Count { kAccepted, kRejected, kPowell, kLm };  // columns of `counts`

// theta*a + (1 - theta)*b
template <typename T>
__device__ __forceinline__ T mixed(T theta, T a, T b) {
  return theta * a + (T(1) - theta) * b;
}

// What (5) averages: a change as it is given, or the difference of two means.
template <typename T>
struct Change {
  const T* x;

  __device__ __forceinline__ T operator()(int j) const { return x[j]; }
};

template <typename T>
struct Difference {
  const T* before;
  const T* next;

  __device__ __forceinline__ T operator()(int j) const { return next[j] - before[j]; }
  __device__ __forceinline__ bool packed() const { return aligned(before) && aligned(next); }
  __device__ __forceinline__ Pack<T> pack(int j) const {
    const Pack<T> b = load_pack(before + j);
    Pack<T> out = load_pack(next + j);
#pragma unroll
    for (int e = 0; e < Pack<T>::kWidth; ++e) out.value[e] -= b.value[e];
    return out;
  }
};

// (5) formed where it is used: decay*v + (1-decay)*x, or v where it is not to change.
template <typename T, template <typename> class Of>
struct Averaged {
  const T* v;
  Of<T> x;
  T decay;
  T rest;  // 1 - decay, rounded once
  bool keep;

  __device__ __forceinline__ T operator()(int j) const {
    return keep ? decay * v[j] + rest * x(j) : v[j];
  }
  __device__ __forceinline__ bool packed() const { return aligned(v) && x.packed(); }
  __device__ __forceinline__ Pack<T> pack(int j) const {
    Pack<T> out = load_pack(v + j);
    if (!keep) return out;
    const Pack<T> step = x.pack(j);
#pragma unroll
    for (int e = 0; e < Pack<T>::kWidth; ++e) {
      out.value[e] = decay * out.value[e] + rest * step.value[e];
    }
    return out;
  }
};

// What (6) and (7) make of a pair, elements formed where they are used.
template <typename T>
struct Damped {
  const T* s;
  const T* y;
  const T* Hy;
  bool powell;
  bool lm;
  T theta_s;
  T theta_y;

  __device__ __forceinline__ T s_of(T s_j, T Hy_j) const {
    return powell ? mixed(theta_s, s_j, Hy_j) : s_j;  // (6)
  }
  __device__ __forceinline__ T y_of(T s_j, T y_j, T Hy_j) const {
    return lm ? mixed(theta_y, y_j, s_of(s_j, Hy_j)) : y_j;  // (7)
  }
  __device__ __forceinline__ T s_at(int j) const { return s_of(s[j], Hy[j]); }

  // As a vector to multiply with: the damped y.
  __device__ __forceinline__ T operator()(int j) const { return y_of(s[j], y[j], Hy[j]); }
  __device__ __forceinline__ bool packed() const {
    return aligned(s) && aligned(y) && aligned(Hy);
  }
  __device__ __forceinline__ Pack<T> pack(int j) const {
    const Pack<T> a = load_pack(s + j), b = load_pack(Hy + j);
    Pack<T> out = load_pack(y + j);
#pragma unroll
    for (int e = 0; e < Pack<T>::kWidth; ++e) {
      out.value[e] = y_of(a.value[e], out.value[e], b.value[e]);
    }
    return out;
  }
};

// Both tests for one layer; all threads of the block take part. `room`: 2 doubles per warp.
template <typename T>
__device__ Damped<T> damping(
    int n, const T* s, const T* y, const T* Hy, double mu1, double lam, double* room) {
  Damped<T> d{s, y, Hy, false, false, T(1), T(1)};
  const double mu2 = static_cast<T>(lam);
  double sums[2] = {};  // s'y, y'Hy
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    sums[0] += static_cast<double>(s[j]) * y[j];
    sums[1] += static_cast<double>(y[j]) * Hy[j];
  }
  block_sum(sums, room);
  d.powell = !(sums[0] > mu1 * sums[1]);  // also where a sum is NaN
  if (d.powell) d.theta_s = static_cast<T>((1 - mu1) * sums[1] / (sums[1] - sums[0]));

  sums[0] = sums[1] = 0;  // s'y, s's with the damped s
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const double s_j = d.s_at(j);
    sums[0] += s_j * y[j];
    sums[1] += s_j * s_j;
  }
  block_sum(sums, room);
  d.lm = !(sums[0] > mu2 * sums[1]);
  if (d.lm) d.theta_y = static_cast<T>((1 - mu2) * sums[1] / (sums[1] - sums[0]));
  return d;
}

}  // namespace kbfgs::cuda
