// Arguments of the CUDA kernels: on the lead tensor's device, with the guard set to it, and on its
// current stream. The allocator is stream-ordered, so that copies and scratch may go when this does.
#pragma once

#ifndef KBFGS_CUDA_HOST
#include <cuda_runtime_api.h>
#endif

#include <climits>

#include "arguments.h"

namespace kbfgs::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device.index, &handle_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(handle_); }

 private:
  CUDAGuardHandle handle_;
};

inline cudaStream_t current_stream(Device device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
class CudaArguments : public Arguments<T> {
 public:
  // Kernels count a matrix's elements in 32 bits (row_share in matvec.cuh).
  CudaArguments(const Call& call, const Tensor& lead)
      : Arguments<T>(call, "cuda", lead.device(), INT_MAX),
        guard_(lead.device()),
        stream_(current_stream(lead.device())) {}

  cudaStream_t stream() const { return stream_; }

 private:
  DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace kbfgs::cuda
