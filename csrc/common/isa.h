// One kernel body, compiled for several instruction sets, chosen once at run time.
//
// A body is a struct with `template <int W> static void run(args...)`, W being the width of its
// vectors in bytes. It is forced inline into one wrapper per instruction set, so that a wheel built
// on any machine uses what the machine it runs on has. Bodies hold no lambdas: those would not
// inherit the wrapper's instruction set.
#pragma once

#include <atomic>

#define KBFGS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define KBFGS_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define KBFGS_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#else  // NEON and others: what the compiler assumes anyway, in vectors of 16 bytes
#define KBFGS_TARGET_AVX2
#define KBFGS_TARGET_AVX512
#endif

namespace kbfgs {

enum class Isa { baseline, avx2, avx512 };

// The widest that this processor has.
inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The one in use: the widest, unless a test asks for another.
inline std::atomic<Isa>& active_isa() {
  static std::atomic<Isa> active{widest_isa()};
  return active;
}

template <class Body, class... Args>
void run_baseline(Args... args) {
  Body::template run<16>(args...);
}

#if defined(__x86_64__)
template <class Body, class... Args>
KBFGS_TARGET_AVX2 void run_avx2(Args... args) {
  Body::template run<32>(args...);
}

template <class Body, class... Args>
KBFGS_TARGET_AVX512 void run_avx512(Args... args) {
  Body::template run<64>(args...);
}
#endif

template <class Body, class... Args>
void vectorised(Args... args) {
#if defined(__x86_64__)
  switch (active_isa().load(std::memory_order_relaxed)) {
    case Isa::avx512:
      return run_avx512<Body>(args...);
    case Isa::avx2:
      return run_avx2<Body>(args...);
    default:
      break;
  }
#endif
  run_baseline<Body>(args...);
}

}  // namespace kbfgs
