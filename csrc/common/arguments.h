// The tensors of an op's call as pointers, checked for what the kernels rely on: device, layout,
// dtype, contiguity, number of elements. (Shapes are checked by the ops' api.py, with better words;
// the number of elements again, so that no call can reach past a tensor.)
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "call.h"
#include "numbers.h"
#include "torch_tensor.h"

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
  Arguments(const Call& call, const char* kernels, Device device, int64_t most = INT64_MAX)
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
    return static_cast<T*>(in_order(t));
  }
  // As `state` and `input`, but T or 16-bit.
  Numbers<T> written_numbers(const char* name, size_t i, int64_t elements) const {
    const Tensor& t = tensor(name, i);
    const Format format = check_numbers(name, t, elements);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return {t.data(), format};
  }
  Numbers<T> numbers(const char* name, size_t i, int64_t elements) {
    const Tensor& t = tensor(name, i);
    const Format format = check_numbers(name, t, elements);
    return {in_order(t), format};
  }
  // Read only, T or 16-bit: any row stride, unit column stride; n columns, or n - 1 and one of ones
  // implied.
  Strided<Numbers<T>> rows(const char* name, size_t i, int64_t n) {
    const Tensor& t = tensor(name, i);
    const Format format = check_numbers(name, t, t.numel());
    if (t.dim() != 2 || (t.size(1) != n && t.size(1) != n - 1))
      throw std::invalid_argument(
          std::string(name) + " must have rows of " + std::to_string(n) + " elements or one less");
    const bool fits = (t.stride(1) == 1 || t.size(1) <= 1) &&
                      (t.stride(0) >= t.size(1) || t.size(0) <= 1);
    if (!fits) return {{in_order(t), format}, t.size(0), t.size(1), t.size(1)};
    return {{t.data(), format}, t.size(0), t.size(1), t.stride(0)};
  }
  // Columns of T, of any row stride; a vector is one.
  Strided<T*> columns(const char* name, size_t i) {
    const Tensor& t = tensor(name, i);
    if (t.dim() == 1) return {input(name, i, t.numel()), t.numel(), 1, 1};
    check<T>(name, t, t.numel());
    const Strided<Numbers<T>> found = rows(name, i, t.dim() == 2 ? t.size(1) : 0);
    return {found.data.as_own(), found.m, found.columns, found.stride};
  }
  // Used in place, as `state`, but with any row stride: a matrix inside a larger one.
  Strided<T*> tile(const char* name, size_t i, int64_t m, int64_t columns) const {
    const Tensor& t = tensor(name, i);
    check<T>(name, t, m * columns);
    const bool fits = t.dim() == 2 && (t.stride(1) == 1 || columns <= 1) &&
                      (t.stride(0) >= columns || m <= 1);
    if (!fits) throw Unsupported(std::string(name) + " is not contiguous by rows");
    return {static_cast<T*>(t.data()), m, columns, m <= 1 ? columns : t.stride(0)};
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
    return static_cast<U*>(keep(uninitialised(elements, kDtype<U>, device_)));
  }

 private:
  void* keep(TorchTensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().data_ptr();
  }
  // Its elements without gaps: where they lie, or copied.
  void* in_order(const Tensor& t) {
    return t.is_contiguous() ? t.data() : keep(contiguous_copy(t));
  }
  template <typename Number>
  void check(const char* name, const Tensor& t, int64_t elements) const {
    check_plain(name, t, elements);
    if (t.dtype() != kDtype<Number>) refuse(name, t, name_of(kDtype<Number>));
  }
  // 16-bit numbers go with 32-bit state.
  Format check_numbers(const char* name, const Tensor& t, int64_t elements) const {
    check_plain(name, t, elements);
    if (t.dtype() == kDtype<T>) return Format::kOwn;
    if constexpr (std::is_same_v<T, float>) {
      if (t.dtype() == kBfloat16) return Format::kBfloat16;
      if (t.dtype() == kHalf) return Format::kHalf;
      refuse(name, t, "float32, bfloat16 and float16");
    }
    refuse(name, t, name_of(kDtype<T>));
  }
  [[noreturn]] void refuse(const char* name, const Tensor& t, const std::string& wanted) const {
    throw Unsupported(
        std::string(name) + " is " + name_of(t.dtype()) + ", the " + kernels_ + " kernels take " +
        wanted);
  }
  void check_plain(const char* name, const Tensor& t, int64_t elements) const {
    if (t.device() != device_)
      throw Unsupported(std::string(name) + " is not on " + name_of(device_));
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
    return static_cast<Number*>(t.data());
  }

  const Call& call_;
  const char* kernels_;
  Device device_;
  int64_t most_;
  std::vector<TorchTensor> kept_;
};

// Calls run(T{}) with the dtype of the op's first list; an empty list has nothing to run.
template <class Run>
void by_dtype(const char* kernels, const Tensors& lead, const Run& run) {
  if (lead.empty()) return;
  if (lead[0].dtype() == kDtype<float>) return run(float{});
  if (lead[0].dtype() == kDtype<double>) return run(double{});
  throw Unsupported(
      std::string("the ") + kernels + " kernels take float32 and float64, not " +
      name_of(lead[0].dtype()));
}

// The same for an op whose numbers may all be integers; without those there is nothing to run.
template <class Run>
void by_dtype_or_float(
    const char* kernels, const Tensors& lead, const Tensors& integers, const Run& run) {
  if (integers.empty()) return;
  lead.empty() ? run(float{}) : by_dtype(kernels, lead, run);
}

}  // namespace kbfgs
