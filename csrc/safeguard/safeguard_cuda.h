// admit (20) and judge (14) on a GPU.
#pragma once

#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

#include "safeguard.h"

namespace kbfgs::cuda {

// One launch for all.
template <typename T>
void admit(const std::vector<Admission<T>>& admissions, bool take, cudaStream_t stream);

// One launch for all judgements; `ok` may be null.
template <typename T>
void judge(
    const std::vector<Judge<T>>& judgements, const JudgeRule& rule, const bool* ok,
    cudaStream_t stream);

}  // namespace kbfgs::cuda
