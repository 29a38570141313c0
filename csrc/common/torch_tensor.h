// Tensors of torch: what a call needs beside its own, and what torch computes with.
#pragma once

#include <stdexcept>

#include "stable.h"
#include "tensor.h"

namespace kbfgs {

using TorchTensor = torch::stable::Tensor;

inline torch::headeronly::ScalarType torch_type(Dtype dtype) {
  using torch::headeronly::ScalarType;
  if (dtype == kDtype<float>) return ScalarType::Float;
  if (dtype == kDtype<double>) return ScalarType::Double;
  if (dtype == kHalf) return ScalarType::Half;
  if (dtype == kBfloat16) return ScalarType::BFloat16;
  if (dtype == kDtype<int>) return ScalarType::Int;
  throw std::logic_error("no tensor is made of " + name_of(dtype));
}

inline torch::stable::Device torch_device(Device device) {
  using torch::headeronly::DeviceType;
  return device == kCpu ? torch::stable::Device(DeviceType::CPU)
                               : torch::stable::Device(DeviceType::CUDA, device.index);
}

// A view of these elements.
inline TorchTensor torch_view(
    const void* data, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    torch::headeronly::IntHeaderOnlyArrayRef strides, Dtype dtype, Device device) {
  return torch::stable::from_blob(
      const_cast<void*>(data), sizes, strides, torch_device(device), torch_type(dtype));
}

inline TorchTensor contiguous_copy(const Tensor& t) {
  const auto dim = static_cast<size_t>(t.dim());
  return torch::stable::contiguous(
      torch_view(t.data(), {t.sizes(), dim}, {t.strides(), dim}, t.dtype(), t.device()));
}

// By the shim, as stable::empty takes twice the time by way of the dispatcher.
inline TorchTensor uninitialised(int64_t elements, Dtype dtype, Device device) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &elements, &stride, to<int32_t>(from(torch_type(dtype))),
      to<int32_t>(from(torch_device(device).type())), device.index, &handle));
  return TorchTensor(handle);
}

}  // namespace kbfgs
