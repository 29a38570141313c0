// A layer's averaged pair (5) from the call of an op that updates it.
#pragma once

#include "../common/cpu_arguments.h"
#include "double_damping.h"

namespace kbfgs {

template <typename T>
PairEma<T> pair_of(CpuArguments<T>& args, size_t i) {
  const int64_t n = args.tensor("s", i).numel();
  return {n, args.state("s", i, n), args.state("y", i, n), args.input("h_change", i, n),
          args.input("g_bar", i, n), args.input("g_bar_next", i, n)};
}

}  // namespace kbfgs
