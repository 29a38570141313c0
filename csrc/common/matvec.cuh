// Rows of many matrices shared out over the blocks of one grid, and their dot products with a vector.
#pragma once

#include "device.cuh"

namespace kbfgs::cuda {

// Rows at once per warp: two share each load of the vector, and their loads are all in flight before
// the first use (2 rows x 2 packs x 16 bytes per thread, 32 KB per block of 512 threads; an H100's
// 3.35 TB/s need about 15 KB in flight per multiprocessor).
constexpr int kRowsAtOnce = 2;
constexpr int kPacksAtOnce = 2;

// Rows of one matrix that belong to this block: those that start in the block's equal part of the
// concatenation of all matrices, so that blocks carry equal bytes whatever the sizes.
struct RowShare {
  int begin;
  int end;
};

inline int64_t equal_part(int64_t total, int64_t blocks) { return (total + blocks - 1) / blocks; }

// `before`: elements of the matrices before this one; `part`: equal_part of all. One matrix has fewer
// than 2^32 elements (cuda_arguments.h sees to it), so that rows are found by 32-bit divisions, which
// are no calls: a call makes ptxas spill.
__device__ __forceinline__ RowShare row_share(int rows, int columns, int64_t before, int64_t part) {
  const int64_t from = part * blockIdx.x - before;
  const int64_t to = from + part;
  const int64_t size = static_cast<int64_t>(rows) * columns;
  if (to <= 0 || from >= size) return {0, 0};
  const auto row_at = [columns](int64_t element) {
    return static_cast<int>((static_cast<uint32_t>(element) + columns - 1u) / uint32_t(columns));
  };
  return {from <= 0 ? 0 : row_at(from), to >= size ? rows : row_at(to)};
}

// A row's place on chip: padded to whole packs.
template <typename T>
__device__ __forceinline__ int padded(int n) {
  constexpr int kWidth = Pack<T>::kWidth;
  return (n + kWidth - 1) / kWidth * kWidth;
}

// A vector that lies in memory. Other vectors are formed where they are used (see damping.cuh).
template <typename T>
struct Plain {
  const T* v;
  __device__ __forceinline__ T operator()(int j) const { return v[j]; }
  __device__ __forceinline__ bool packed() const { return aligned(v); }
  __device__ __forceinline__ Pack<T> pack(int j) const { return load_pack(v + j); }
};

// sum[k] = rows[k*pitch + .] times vec for the first `count` (1 or 2) rows, in every lane. With `keep`
// the rows are also stored there, keep_pitch apart: the copy on chip that later phases read. E is T,
// or a 16-bit type that is widened, and not kept.
template <typename T, typename E, typename Vector>
__device__ __forceinline__ void dot_rows(
    const E* rows, int64_t pitch, int count, int n, const Vector& vec, T* keep, int keep_pitch,
    T (&sum)[kRowsAtOnce]) {
  constexpr int kWidth = Pack<E>::kWidth, kOwnWidth = Pack<T>::kWidth;
  constexpr bool kOwn = std::is_same_v<E, T>;
  // A missing second row repeats the first: no branch in the loop, the result is not used.
  const int64_t step = count > 1 ? pitch : 0;
  const int keep_step = count > 1 ? keep_pitch : 0;
  sum[0] = sum[1] = T(0);

  int done = 0;
  if (aligned(rows) && pitch % kWidth == 0 && vec.packed()) {
    done = n / kWidth * kWidth;
    constexpr int kStride = kWarp * kWidth;
    const auto add = [&](int j, const Pack<E>(&a)[kRowsAtOnce]) {
#pragma unroll
      for (int first = 0; first < kWidth; first += kOwnWidth) {
        const Pack<T> x = vec.pack(j + first);
#pragma unroll
        for (int k = 0; k < kRowsAtOnce; ++k) {
          if constexpr (kOwn) {
            if (keep) store_pack(keep + k * keep_step + j, a[k]);
          }
#pragma unroll
          for (int e = 0; e < kOwnWidth; ++e) sum[k] += widened(a[k].value[first + e]) * x.value[e];
        }
      }
    };
    int j = lane_id() * kWidth;
    for (; j + (kPacksAtOnce - 1) * kStride < done; j += kPacksAtOnce * kStride) {
      Pack<E> a[kPacksAtOnce][kRowsAtOnce];
#pragma unroll
      for (int u = 0; u < kPacksAtOnce; ++u) {
#pragma unroll
        for (int k = 0; k < kRowsAtOnce; ++k) a[u][k] = load_pack(rows + k * step + j + u * kStride);
      }
#pragma unroll
      for (int u = 0; u < kPacksAtOnce; ++u) add(j + u * kStride, a[u]);
    }
#pragma unroll 1
    for (; j < done; j += kStride) {
      const Pack<E> a[kRowsAtOnce] = {load_pack(rows + j), load_pack(rows + step + j)};
      add(j, a);
    }
  }

  // Rows or a vector off the 16-byte grid (every factor with a bias column of odd size), and tails.
  constexpr int kScalarsAtOnce = kPacksAtOnce * kOwnWidth;
  const auto add = [&](int j, const E(&a)[kRowsAtOnce]) {
    const T x = vec(j);
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if constexpr (kOwn) {
        if (keep) keep[k * keep_step + j] = a[k];
      }
      sum[k] += widened(a[k]) * x;
    }
  };
  // A lane's elements from j on, kCount of them with all loads in flight together.
  int j = done + lane_id();
  const auto some = [&]<int kCount>(std::integral_constant<int, kCount>) {
    E a[kCount][kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) a[u][k] = rows[k * step + j + u * kWarp];
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) add(j + u * kWarp, a[u]);
    j += kCount * kWarp;
  };
  const auto fits = [&](int count) { return j + (count - 1) * kWarp < n; };
  static_assert(kScalarsAtOnce == 4 || kScalarsAtOnce == 8);
  while (fits(kScalarsAtOnce)) some(std::integral_constant<int, kScalarsAtOnce>());
  // What is left, by halves: at most three latencies where single elements have seven.
  if constexpr (kScalarsAtOnce == 8) {
    if (fits(4)) some(std::integral_constant<int, 4>());
  }
  if (fits(2)) some(std::integral_constant<int, 2>());
  if (fits(1)) some(std::integral_constant<int, 1>());
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) sum[k] = warp_sum(sum[k]);
}

// Rows [begin, end) of a matrix, ld apart, two at a time over the warps of the block: `finish(row,
// dot)` runs in one lane per row. `chip` is where this block keeps these rows, of which the first
// `kept` fit; `fill` says whether they are read from memory and kept now, or read from the chip. Those
// of a 16-bit type E are never kept.
template <typename T, typename E, typename Vector, typename Finish>
__device__ __forceinline__ void matvec_rows(
    const E* matrix, int64_t ld, int n, RowShare share, const Vector& vec, T* chip, int kept,
    bool fill, const Finish& finish) {
  const int pitch = padded<T>(n);
  for (int row = share.begin + kRowsAtOnce * warp_id(); row < share.end;
       row += kRowsAtOnce * warps_per_block()) {
    const int count = min(kRowsAtOnce, share.end - row);
    const int local = row - share.begin;
    const bool on_chip = local + count <= kept;
    T* place = on_chip ? chip + static_cast<int64_t>(local) * pitch : nullptr;
    T sum[kRowsAtOnce];
    if (on_chip && !fill) {
      dot_rows<T, T>(place, pitch, count, n, vec, nullptr, 0, sum);
    } else {
      dot_rows<T>(matrix + row * ld, ld, count, n, vec, place, pitch, sum);
    }
    if (lane_id() < count) finish(row + lane_id(), lane_id() == 0 ? sum[0] : sum[1]);
  }
}

}  // namespace kbfgs::cuda
