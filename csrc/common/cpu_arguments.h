// Arguments of the CPU kernels: numbers and flags are read at once.
#pragma once

#include "../factor_ema/factor_ema.h"
#include "arguments.h"

namespace kbfgs {

template <typename T>
struct CpuArguments : Arguments<T> {
  explicit CpuArguments(const Call& call) : Arguments<T>(call, "cpu", kCpu) {}

  double number(const char* name, size_t i) const { return *this->scalar(name, i); }
  Rows<T> rows(const char* name, size_t i, int64_t n) {
    const Strided<Numbers<T>> found = Arguments<T>::rows(name, i, n);
    return {found.data, found.m, found.columns, found.stride, n};
  }
  // True where there is none.
  bool read(const char* name) const {
    const bool* found = this->flag(name);
    return found == nullptr || *found;
  }
};

}  // namespace kbfgs
