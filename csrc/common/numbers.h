// Numbers that may be 16-bit beside 32-bit state: what a layer's input, parameters and gradients are
// under autocast or with 16-bit parameters. They are widened exactly where they are read, and rounded
// to nearest even where they are written.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KBFGS_ANYWHERE __device__ __forceinline__  // no kernel's launcher reads them
#else
#define KBFGS_ANYWHERE inline
#endif

namespace kbfgs {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
enum class Format : int { kOwn, kBfloat16, kHalf };  // kOwn: the state's type

#ifdef __CUDA_ARCH__

__device__ __forceinline__ float widened(Bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widened(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void round_to(Bfloat16& to, float x) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void round_to(Half& to, float x) {
  to.bits = __half_as_ushort(__float2half_rn(x));
}

#else

namespace detail {
KBFGS_ANYWHERE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
KBFGS_ANYWHERE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
}  // namespace detail

KBFGS_ANYWHERE float widened(Bfloat16 x) {
  return detail::as_float(static_cast<uint32_t>(x.bits) << 16);
}
KBFGS_ANYWHERE float widened(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest < 0x400)  // zero or denormal: a multiple of 2^-24
    return detail::as_float(
        sign | detail::as_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));
  const uint32_t bias = rest < 0x7c00 ? 112u << 23 : 224u << 23;  // or Inf, NaN
  return detail::as_float(sign | ((rest << 13) + bias));
}
KBFGS_ANYWHERE void round_to(Bfloat16& to, float x) {
  const uint32_t bits = detail::as_bits(x);
  to.bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
KBFGS_ANYWHERE void round_to(Half& to, float x) {
  const uint32_t bits = detail::as_bits(x), sign = bits >> 16 & 0x8000;
  const float size = detail::as_float(bits & 0x7fffffff);
  uint32_t rest;
  if (!(size == size)) {
    rest = 0x7e00;
  } else if (size >= 65520.0f) {  // rounds past the largest
    rest = 0x7c00;
  } else if (size < 6.103515625e-5f) {  // denormal: the sum's last bit is worth 2^-24
    rest = detail::as_bits(size + 0.5f) - detail::as_bits(0.5f);
  } else {
    const uint32_t whole = bits & 0x7fffffff;
    rest = (whole + 0xfff + (whole >> 13 & 1) - (112u << 23)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | rest);
}

#endif

KBFGS_ANYWHERE float widened(float x) { return x; }
KBFGS_ANYWHERE double widened(double x) { return x; }
KBFGS_ANYWHERE void round_to(float& to, float x) { to = x; }
KBFGS_ANYWHERE void round_to(double& to, double x) { to = x; }

template <typename E>
KBFGS_ANYWHERE E rounded_to(float x) {
  E found;
  round_to(found, x);
  return found;
}

// An array of T, or of 16-bit numbers where T is float.
template <typename T>
struct Numbers {
  void* data;
  Format format;

  KBFGS_ANYWHERE bool own() const { return format == Format::kOwn; }
  KBFGS_ANYWHERE T* as_own() const { return static_cast<T*>(data); }

  // run(pointer) with a pointer of the numbers' type.
  template <class Run>
  KBFGS_ANYWHERE decltype(auto) visit(const Run& run) const {
    if constexpr (std::is_same_v<T, float>) {
      if (format == Format::kBfloat16) return run(static_cast<Bfloat16*>(data));
      if (format == Format::kHalf) return run(static_cast<Half*>(data));
    }
    return run(static_cast<T*>(data));
  }
  KBFGS_ANYWHERE T at(int64_t i) const {
    return visit([i](auto* p) -> T { return widened(p[i]); });
  }
  KBFGS_ANYWHERE void set(int64_t i, T x) const {
    visit([i, x](auto* p) { round_to(p[i], x); });
  }
};

}  // namespace kbfgs
