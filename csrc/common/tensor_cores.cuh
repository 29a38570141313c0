// Products of 16-bit numbers on tensor cores.
#pragma once

#include "device.cuh"

namespace kbfgs::cuda {

// Two numbers that are neighbours along the sum, the first in the low half: what a register of
// `multiply_add` holds.
template <typename E>
__device__ __forceinline__ uint32_t pair_of(E first, E second) {
  return static_cast<uint32_t>(second.bits) << 16 | first.bits;
}

#ifdef __CUDACC__

// c += a b for a warp: a is 16 x 16, b is 16 x 8, c is 16 x 8 in 32 bits. With g = lane / 4 and t =
// lane % 4 a lane holds of
//   a: rows g, g + 8, g, g + 8 at 2t, 2t, 2t + 8, 2t + 8 along the sum (and the next);
//   b: column g at 2t, 2t + 8 along the sum (and the next);
//   c: row g at columns 2t, 2t + 1, row g + 8 at the same.
// The products are exact. (PTX ISA, mma.m16n8k16)
__device__ __forceinline__ void multiply_add(
    float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(
    float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else  // on the host, for tests

template <typename E>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], E) {
  struct A { uint32_t word[4]; };
  struct B { uint32_t word[2]; };
  const auto number = [](uint32_t word, int half) {
    return widened(E{static_cast<uint16_t>(word >> 16 * half)});
  };
  const int g = lane_id() / 4, t = lane_id() % 4;
  float left[2][16], right[2][16];  // rows g and g + 8 of a, columns 2t and 2t + 1 of b
  const A* as = cuda_host::gather(A{{a[0], a[1], a[2], a[3]}});
  for (int k = 0; k < 16; ++k)
    for (int r = 0; r < 2; ++r)
      left[r][k] = number(as[4 * g + k % 8 / 2].word[r + k / 8 * 2], k % 2);
  const B* bs = cuda_host::gather(B{{b[0], b[1]}});
  for (int k = 0; k < 16; ++k)
    for (int r = 0; r < 2; ++r)
      right[r][k] = number(bs[4 * (2 * t + r) + k % 8 / 2].word[k / 8], k % 2);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += left[i / 2][k] * right[i % 2][k];
}

#endif

}  // namespace kbfgs::cuda
