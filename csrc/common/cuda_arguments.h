// Tensors to pointers for bindings_cuda.cpp: what the CUDA kernels rely on is checked here, and what
// they do not take raises Unsupported.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <climits>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace kbfgs::cuda {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Flag = std::optional<Tensor>;

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensors of one call as pointers to T, on the lead tensor's device with the guard set to it.
// Copies of strided inputs live as long as this; the allocator is stream-ordered, so that is enough.
template <typename T>
class Arguments {
 public:
  explicit Arguments(const Tensor& lead)
      : device_(lead.device()),
        guard_(device_),
        stream_(c10::cuda::getCurrentCUDAStream(device_.index()).stream()) {}

  cudaStream_t stream() const { return stream_; }

  // Written, or a matrix: used in place.
  T* state(const char* name, const Tensor& t) const {
    check(name, t, at::CppTypeToScalarType<T>::value);
    contiguous(name, t);
    return t.data_ptr<T>();
  }
  // Read only: made contiguous where it is not.
  T* input(const char* name, const Tensor& t) {
    check(name, t, at::CppTypeToScalarType<T>::value);
    return keep(t.contiguous()).template data_ptr<T>();
  }
  // Read only: any row stride, unit column stride.
  T* rows(const char* name, const Tensor& t, int64_t* ld) {
    check(name, t, at::CppTypeToScalarType<T>::value);
    const bool fits =
        (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
    const Tensor& used = keep(fits ? t : t.contiguous());
    *ld = used.stride(0);
    return used.data_ptr<T>();
  }
  int64_t* integers(const char* name, const Tensor& t) const {
    check(name, t, at::kLong);
    contiguous(name, t);
    return t.data_ptr<int64_t>();
  }
  const double* scalar(const char* name, const Tensor& t) const {
    check(name, t, at::kDouble);
    one(name, t);
    return t.data_ptr<double>();
  }
  const bool* flag(const char* name, const Flag& t) const {
    if (!t) return nullptr;
    check(name, *t, at::kBool);
    one(name, *t);
    return t->data_ptr<bool>();
  }
  // Uninitialised, as long as this lives.
  template <typename U = T>
  U* scratch(int64_t elements) {
    const auto type = at::CppTypeToScalarType<U>::value;
    return keep(at::empty({elements}, at::TensorOptions().device(device_).dtype(type)))
        .template data_ptr<U>();
  }

 private:
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }
  void check(const char* name, const Tensor& t, at::ScalarType wanted) const {
    if (t.device() != device_)
      throw Unsupported(
          std::string(name) + " is on " + t.device().str() + ", the first list on " +
          device_.str());
    if (t.scalar_type() != wanted)
      throw Unsupported(
          std::string(name) + " is " + c10::toString(t.scalar_type()) +
          " where the cuda kernels take " + c10::toString(wanted));
    if (t.numel() > INT_MAX) throw Unsupported(std::string(name) + " has more than 2^31 elements");
  }
  static void contiguous(const char* name, const Tensor& t) {
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
  }
  static void one(const char* name, const Tensor& t) {
    if (t.numel() != 1) throw Unsupported(std::string(name) + " is not a scalar");
  }

  at::Device device_;
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
  std::deque<Tensor> kept_;  // references into it stay valid
};

// Calls run(T{}, lead) with the dtype of the op's first list; an empty list has nothing to run.
template <class Run>
void by_dtype(const Tensors& lead, const Run& run) {
  if (lead.empty()) return;
  switch (lead[0].scalar_type()) {
    case at::kFloat:
      return run(float{}, lead[0]);
    case at::kDouble:
      return run(double{}, lead[0]);
    default:
      throw Unsupported(
          std::string("the cuda kernels take float32 and float64, not ") +
          c10::toString(lead[0].scalar_type()));
  }
}

}  // namespace kbfgs::cuda
