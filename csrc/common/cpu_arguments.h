// Arguments of the CPU kernels: numbers and flags are read at once.
#pragma once

#include "../factor_ema/factor_ema.h"
#include "arguments.h"

namespace kbfgs {

template <typename T>
struct CpuArguments : Arguments<T> {
  CpuArguments() : Arguments<T>("cpu", at::kCPU) {}

  double number(const char* name, const Tensors& list, size_t i) const {
    return *this->scalar(name, list, i);
  }
  Rows<T> rows(const char* name, const Tensors& list, size_t i, int64_t n) {
    const Strided<T> found = Arguments<T>::rows(name, list, i, n);
    return {found.data, found.m, found.columns, found.stride, n};
  }
  bool read(const char* name, const Flag& given) const {
    return !given || *this->flag(name, given);
  }
};

}  // namespace kbfgs
