// The tensors of an op's call as pointers, checked for what the kernels rely on: device, layout,
// dtype, contiguity, number of elements. (Shapes are checked by the ops' api.py, with better words;
// the number of elements again, so that no call can reach past a tensor.)
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "call.h"
#include "numbers.h"

namespace kbfgs {

// Becomes kbfgs_ext.ops.registry.Unsupported: another backend may take the call.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename Data>
struct Strided {
  Data data;  // m x columns, unit column stride
  int64_t m;
  int64_t columns;
  int64_t stride;  // of the rows
};

// The tensors of one call as pointers to T, by name, each checked to be on `device` and to hold
// `elements`; copies of read-only ones live as long as this.
template <typename T>
class Arguments {
 public:
  // `kernels` is "cpu" or "cuda", for messages; `most`: elements that a tensor may have.
  Arguments(const Call& call, const char* kernels, at::Device device, int64_t most = INT64_MAX)
      : call_(call), kernels_(kernels), device_(device), most_(most) {}

  // Whether the list has entries.
  bool given(const char* name) const { return !call_.tensors(name).empty(); }
  size_t count(const char* name) const { return call_.tensors(name).size(); }
  const Tensor& tensor(const char* name, size_t i) const { return call_.tensors(name).at(i); }

  // Written, or a matrix of the state: used in place.
  T* state(const char* name, size_t i, int64_t elements) const {
    return in_place<T>(name, tensor(name, i), elements);
  }
  int64_t* integers(const char* name, size_t i, int64_t elements) const {
    return in_place<int64_t>(name, tensor(name, i), elements);
  }
  bool* flags(const char* name, size_t i, int64_t elements) const {
    return in_place<bool>(name, tensor(name, i), elements);
  }
  // Read only: made contiguous where it is not.
  T* input(const char* name, size_t i, int64_t elements) {
    const Tensor& t = tensor(name, i);
    check<T>(name, t, elements);
    return keep(t.contiguous()).template data_ptr<T>();
  }
  // As `state` and `input`, but T or 16-bit.
  Numbers<T> written_numbers(const char* name, size_t i, int64_t elements) const {
    const Tensor& t = tensor(name, i);
    const Format format = check_numbers(name, t, elements);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return {t.data_ptr(), format};
  }
  Numbers<T> numbers(const char* name, size_t i, int64_t elements) {
    const Tensor& t = tensor(name, i);
    const Format format = check_numbers(name, t, elements);
    return {keep(t.contiguous()).data_ptr(), format};
  }
  // Read only, T or 16-bit: any row stride, unit column stride; n columns, or n - 1 and one of ones
  // implied.
  Strided<Numbers<T>> rows(const char* name, size_t i, int64_t n) {
    return rows(name, tensor(name, i), n);
  }
  Strided<Numbers<T>> rows(const char* name, const Tensor& t, int64_t n) {
    const Format format = check_numbers(name, t, t.numel());
    if (t.dim() != 2 || (t.size(1) != n && t.size(1) != n - 1))
      throw std::invalid_argument(
          std::string(name) + " must have rows of " + std::to_string(n) + " elements or one less");
    const bool fits = (t.stride(1) == 1 || t.size(1) <= 1) &&
                      (t.stride(0) >= t.size(1) || t.size(0) <= 1);
    const Tensor& used = keep(fits ? t : t.contiguous());
    return {{used.data_ptr(), format}, used.size(0), used.size(1), used.stride(0)};
  }
  // The same of T alone.
  Strided<T*> own_rows(const char* name, const Tensor& t, int64_t n) {
    check<T>(name, t, t.numel());
    const Strided<Numbers<T>> found = rows(name, t, n);
    return {found.data.as_own(), found.m, found.columns, found.stride};
  }
  // Used in place, as `state`, but with any row stride: a matrix inside a larger one.
  Strided<T*> tile(const char* name, size_t i, int64_t m, int64_t columns) const {
    const Tensor& t = tensor(name, i);
    check<T>(name, t, m * columns);
    const bool fits = t.dim() == 2 && (t.stride(1) == 1 || columns <= 1) &&
                      (t.stride(0) >= columns || m <= 1);
    if (!fits) throw Unsupported(std::string(name) + " is not contiguous by rows");
    return {t.data_ptr<T>(), m, columns, m <= 1 ? columns : t.stride(0)};
  }
  double* scalar(const char* name, size_t i) const { return scalars(name, i, 1); }
  double* scalars(const char* name, size_t i, int64_t elements) const {
    return in_place<double>(name, tensor(name, i), elements);
  }
  // Null where there is none.
  const bool* flag(const char* name) const {
    return call_.has(name) ? in_place<bool>(name, call_.tensor(name), 1) : nullptr;
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
  template <typename Number>
  void check(const char* name, const Tensor& t, int64_t elements) const {
    check_plain(name, t, elements);
    constexpr at::ScalarType wanted = at::CppTypeToScalarType<Number>::value;
    if (t.scalar_type() != wanted) refuse(name, t, c10::toString(wanted));
  }
  // 16-bit numbers go with 32-bit state.
  Format check_numbers(const char* name, const Tensor& t, int64_t elements) const {
    check_plain(name, t, elements);
    constexpr at::ScalarType own = at::CppTypeToScalarType<T>::value;
    if (t.scalar_type() == own) return Format::kOwn;
    if constexpr (std::is_same_v<T, float>) {
      if (t.scalar_type() == at::kBFloat16) return Format::kBfloat16;
      if (t.scalar_type() == at::kHalf) return Format::kHalf;
      refuse(name, t, "Float, BFloat16 and Half");
    }
    refuse(name, t, c10::toString(own));
  }
  [[noreturn]] void refuse(const char* name, const Tensor& t, const char* wanted) const {
    throw Unsupported(
        std::string(name) + " is " + c10::toString(t.scalar_type()) + ", the " + kernels_ +
        " kernels take " + wanted);
  }
  void check_plain(const char* name, const Tensor& t, int64_t elements) const {
    if (t.device() != device_ || t.layout() != at::kStrided || t.is_neg())
      throw Unsupported(std::string(name) + " is not a plain tensor on " + device_.str());
    if (t.numel() != elements)
      throw std::invalid_argument(
          std::string(name) + " must have " + std::to_string(elements) + " elements, got " +
          std::to_string(t.numel()));
    if (t.numel() > most_)
      throw Unsupported(
          std::string(name) + " has more than " + std::to_string(most_) + " elements");
  }
  template <typename Number>
  Number* in_place(const char* name, const Tensor& t, int64_t elements) const {
    check<Number>(name, t, elements);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return t.data_ptr<Number>();
  }

  const Call& call_;
  const char* kernels_;
  at::Device device_;
  int64_t most_;
  Tensors kept_;
};

// Calls run(T{}) with the dtype of the op's first list; an empty list has nothing to run.
template <class Run>
void by_dtype(const char* kernels, const Tensors& lead, const Run& run) {
  if (lead.empty()) return;
  switch (lead[0].scalar_type()) {
    case at::kFloat: return run(float{});
    case at::kDouble: return run(double{});
    default: break;
  }
  throw Unsupported(
      std::string("the ") + kernels + " kernels take float32 and float64, not " +
      c10::toString(lead[0].scalar_type()));
}

// The same for an op whose numbers may all be integers; without those there is nothing to run.
template <class Run>
void by_dtype_or_float(
    const char* kernels, const Tensors& lead, const Tensors& integers, const Run& run) {
  if (integers.empty()) return;
  lead.empty() ? run(float{}) : by_dtype(kernels, lead, run);
}

}  // namespace kbfgs
