// The tensors of an op's call as pointers, checked for what the CPU kernels rely on: device, layout,
// dtype, contiguity, number of elements. (Shapes are checked by the ops' api.py, with better words;
// the number of elements again, so that no call can reach past a tensor.)
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../factor_ema/factor_ema.h"

namespace kbfgs {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Flag = std::optional<Tensor>;

// Becomes kbfgs_ext.ops.registry.Unsupported: another backend may take the call.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensors of one call as pointers to T, each checked to hold `elements`; copies of read-only ones
// live as long as this.
template <typename T>
class Arguments {
 public:
  // Written, or a matrix of the state: used in place.
  T* state(const char* name, const Tensors& list, size_t i, int64_t elements) const {
    return in_place<T>(name, list.at(i), elements);
  }
  int64_t* counts(const char* name, const Tensors& list, size_t i) const {
    return in_place<int64_t>(name, list.at(i), 4);
  }
  // Read only: made contiguous where it is not.
  T* input(const char* name, const Tensors& list, size_t i, int64_t elements) {
    check<T>(name, list.at(i), elements);
    copies_.push_back(list[i].contiguous());
    return copies_.back().template data_ptr<T>();
  }
  // Read only: any row stride, unit column stride; n columns, or n - 1 and one of ones implied.
  Rows<T> rows(const char* name, const Tensors& list, size_t i, int64_t n) {
    Tensor t = list.at(i);
    check<T>(name, t, t.dim() == 2 && t.size(1) == n ? t.numel() : t.size(0) * (n - 1));
    if ((t.stride(1) != 1 && t.size(1) > 1) || t.stride(0) < t.size(1)) t = t.contiguous();
    copies_.push_back(t);
    return {t.data_ptr<T>(), t.size(0), t.size(1), t.stride(0), n};
  }
  template <typename Number>
  Number scalar(const char* name, const Tensors& list, size_t i) const {
    return *in_place<Number>(name, list.at(i), 1);
  }
  // Uninitialised, as long as this lives.
  T* scratch(int64_t elements) {
    copies_.push_back(at::empty({elements}, at::CppTypeToScalarType<T>::value));
    return copies_.back().template data_ptr<T>();
  }

 private:
  template <typename Number>
  static void check(const char* name, const Tensor& t, int64_t elements) {
    constexpr at::ScalarType wanted = at::CppTypeToScalarType<Number>::value;
    if (!t.device().is_cpu() || t.layout() != at::kStrided || t.is_neg())
      throw Unsupported(std::string(name) + " is not a plain tensor on the CPU");
    if (t.scalar_type() != wanted)
      throw Unsupported(
          std::string(name) + " is " + c10::toString(t.scalar_type()) + ", the cpu kernels take " +
          c10::toString(wanted));
    if (t.numel() != elements)
      throw std::invalid_argument(
          std::string(name) + " must have " + std::to_string(elements) + " elements, got " +
          std::to_string(t.numel()));
  }
  template <typename Number>
  static Number* in_place(const char* name, const Tensor& t, int64_t elements) {
    check<Number>(name, t, elements);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return t.data_ptr<Number>();
  }

  Tensors copies_;
};

inline bool read(const char* name, const Flag& flag) {
  if (!flag) return true;
  if (flag->scalar_type() != at::kBool || !flag->device().is_cpu() || flag->numel() != 1)
    throw Unsupported(std::string(name) + " is not a bool scalar on the CPU");
  return *flag->data_ptr<bool>();
}

}  // namespace kbfgs
