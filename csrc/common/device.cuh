// What every CUDA kernel here stands on: 16-byte packs, sums over a warp and a block, the grid barrier
// and the one launch function. Device code goes through these names alone, so that
// tests/cuda_host/cuda_host.h can supply them on a machine without a GPU.
#pragma once

#include <cstdint>

#include "launch_shape.h"
#include "numbers.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace kbfgs::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Products that the compiler may not fuse into a multiply-add: a*b + c*d then stays symmetric in
// (a, b) and (c, d) to the last bit.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no stale error for the next caller
  throw std::runtime_error(std::string("kbfgs_ext: ") + what + ": " + cudaGetErrorString(status));
}

inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(
      cudaDeviceGetAttribute(
          &limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
      "multiprocessor count");
  check(
      cudaDeviceGetAttribute(
          &limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "shared memory limit");
  return limits;
}

// The one place where a kernel is launched.
template <typename Parameters>
void launch(
    void (*kernel)(Parameters), const LaunchShape& shape, cudaStream_t stream,
    const Parameters& parameters) {
  static_assert(sizeof(Parameters) <= kParameterLimit);
  if (shape.blocks == 0) return;
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > 48 * 1024) {  // more than every device grants unasked
    check(
        cudaFuncSetAttribute(
            entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shape.shared_bytes)),
        "shared memory of a kernel");
  }
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(
      shape.cooperative
          ? cudaLaunchCooperativeKernel(
                entry, dim3(shape.blocks), dim3(shape.threads), arguments, shape.shared_bytes,
                stream)
          : cudaLaunchKernel(
                entry, dim3(shape.blocks), dim3(shape.threads), arguments, shape.shared_bytes,
                stream),
      "kernel launch");
}

#endif  // __CUDACC__; otherwise tests/cuda_host/cuda_host.h has defined the same names

// 16 bytes: the widest load and store of a thread.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kWidth = 16 / sizeof(T);
  T value[kWidth];
};

template <typename T>
__device__ __forceinline__ bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T>) == 0;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* pointer) {
  return *reinterpret_cast<const Pack<T>*>(pointer);
}

template <typename T>
__device__ __forceinline__ void store_pack(T* pointer, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(pointer) = pack;
}

template <typename T>
__device__ __forceinline__ bool finite(T x) {
  return x - x == T(0);  // Inf - Inf and NaN - NaN are NaN
}

__device__ __forceinline__ bool flag(const bool* ok) { return ok == nullptr || *ok; }

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int warps_per_block() { return static_cast<int>(blockDim.x) / kWarp; }

// The sum over the warp, the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sums over the block, the same bits in every thread and in every block of the same size. `room`
// holds kN values per warp; the first barrier lets a caller reuse it at once.
template <int kN, typename T>
__device__ __forceinline__ void block_sum(T (&x)[kN], T* room) {
#pragma unroll
  for (int k = 0; k < kN; ++k) x[k] = warp_sum(x[k]);
  __syncthreads();
  if (lane_id() == 0) {
#pragma unroll
    for (int k = 0; k < kN; ++k) room[warp_id() * kN + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    x[k] = T(0);
    for (int w = 0; w < warps_per_block(); ++w) x[k] += room[w * kN + k];
  }
}

}  // namespace kbfgs::cuda
