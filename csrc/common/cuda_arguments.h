// Arguments of the CUDA kernels: on the lead tensor's device, with the guard set to it, and on its
// current stream. The allocator is stream-ordered, so that copies and scratch may go when this does.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <climits>

#include "arguments.h"

namespace kbfgs::cuda {

template <typename T>
class CudaArguments : public Arguments<T> {
 public:
  // Kernels count a matrix's elements in 32 bits (row_share in matvec.cuh).
  CudaArguments(const Call& call, const Tensor& lead)
      : Arguments<T>(call, "cuda", lead.device(), INT_MAX),
        guard_(lead.device()),
        stream_(c10::cuda::getCurrentCUDAStream(lead.device().index()).stream()) {}

  cudaStream_t stream() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};

}  // namespace kbfgs::cuda
