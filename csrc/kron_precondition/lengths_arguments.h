// A call of lengths_ as its entries.
#pragma once

#include <vector>

#include "../common/arguments.h"
#include "lengths.h"

namespace kbfgs {

template <typename T>
std::vector<Lengths<T>> lengths_of(Arguments<T>& args, const Tensors& norms) {
  std::vector<Lengths<T>> out;
  for (size_t i = 0; i < norms.size(); ++i) {
    const int64_t n = norms[i].numel();
    out.push_back(
        {args.scalars("sizes", i, n), args.input("norms", i, n), args.scalars("roots", i, n),
         args.scalar("step_size", i), n});
  }
  return out;
}

}  // namespace kbfgs
