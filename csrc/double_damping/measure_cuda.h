// The scales of relative dampings (21), (22) on CUDA.
#pragma once

#include <vector>

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

#include "measure.h"

namespace kbfgs::cuda {

template <typename T>
void measure_inputs(
    std::vector<MeasureInputs<T>> layers, double share, const bool* ok, cudaStream_t stream);

template <typename T>
void measure_pair(
    std::vector<MeasurePair<T>> layers, double share, const bool* ok, cudaStream_t stream);

}  // namespace kbfgs::cuda
