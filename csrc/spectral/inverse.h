// The inverses of symmetric positive definite matrices.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/gemm.h"

namespace kbfgs {

// Elements of `work` per matrix: k/2 x k/2, and the same of half of it.
inline int64_t inverse_workspace(int64_t k) { return rounded_up(k) * rounded_up(k) / 2; }

// M <- M^-1 for every k x k matrix of M, all with leading dimension ld. Read on and above the
// diagonal, written whole. Matrix i has work + i*inverse_workspace(k).
template <typename T>
void invert(const std::vector<T*>& M, T* work, int64_t k, int64_t ld);

}  // namespace kbfgs
