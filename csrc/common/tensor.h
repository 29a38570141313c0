// A tensor of a call: where its elements lie, of what type and in what order, as DLPack has it. It
// owns nothing: the caller holds the tensor.
#pragma once

#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace kbfgs {

using dlpack::Device;
using dlpack::Dtype;

constexpr Device kCpu{dlpack::kCpuDevice, 0};

template <typename T>
constexpr Dtype kDtype{dlpack::kInt, 8 * sizeof(T), 1};
template <>
inline constexpr Dtype kDtype<bool>{dlpack::kBool, 8, 1};
template <>
inline constexpr Dtype kDtype<float>{dlpack::kFloat, 32, 1};
template <>
inline constexpr Dtype kDtype<double>{dlpack::kFloat, 64, 1};
constexpr Dtype kHalf{dlpack::kFloat, 16, 1};
constexpr Dtype kBfloat16{dlpack::kBfloat, 16, 1};

// As torch calls it: float32, bool, cuda:0.
inline std::string name_of(Dtype dtype) {
  if (dtype.code == dlpack::kBool) return "bool";
  constexpr const char* kNames[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  const bool known = dtype.code < std::size(kNames);
  return known ? kNames[dtype.code] + std::to_string(dtype.bits) : "of another dtype";
}
inline std::string name_of(Device device) {
  return device == kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

class Tensor {
 public:
  explicit Tensor(const dlpack::View& view) : view_(view) {
    if (view_.byte_offset != 0) view_.data = static_cast<char*>(view_.data) + view_.byte_offset;
    int64_t dense = 1;
    for (int64_t i = dim() - 1; i >= 0; --i) {
      if (size(i) != 1) contiguous_ &= stride(i) == dense;
      dense *= size(i);
    }
    numel_ = dense;
    contiguous_ |= numel_ == 0;
  }

  Dtype dtype() const { return view_.dtype; }
  Device device() const { return view_.device; }
  int64_t dim() const { return view_.dim; }
  int64_t size(int64_t i) const { return view_.sizes[checked(i)]; }
  int64_t stride(int64_t i) const { return view_.strides[checked(i)]; }
  const int64_t* sizes() const { return view_.sizes; }
  const int64_t* strides() const { return view_.strides; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const { return contiguous_; }
  void* data() const { return view_.data; }

 private:
  int64_t checked(int64_t i) const {
    if (i >= dim()) throw std::out_of_range("a tensor has fewer dimensions than it should");
    return i;
  }

  dlpack::View view_;
  int64_t numel_;
  bool contiguous_ = true;
};

}  // namespace kbfgs
