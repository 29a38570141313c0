// The tensors of a call of judge_ as judgements.
#pragma once

#include "../common/arguments.h"
#include "safeguard.h"

namespace kbfgs {

template <typename T>
std::vector<Judge<T>> judgements(
    Arguments<T>& args, const Tensors& scale, const Tensors& watched, const Tensors& counts,
    const Tensors& decision, const Tensors& loss, const Tensors& loss_next, const Tensors& slope) {
  std::vector<Judge<T>> out;
  for (size_t i = 0; i < scale.size(); ++i)
    out.push_back(
        {args.state("scale", scale, i, 1), args.state("watched", watched, i, 4),
         args.integers("counts", counts, i, 4), args.flags("decision", decision, i, 3),
         args.input("loss", loss, i, 1), args.input("loss_next", loss_next, i, 1),
         slope.empty() ? nullptr : args.input("slope", slope, i, 1)});
  return out;
}

// judge_ of _C; the CUDA one is in bindings_cuda.cpp.
void judge_cpu(
    const Tensors& scale, const Tensors& watched, const Tensors& counts, const Tensors& decision,
    const Tensors& loss, const Tensors& loss_next, const Tensors& slope, double noise,
    double shrink, double grow, double sufficient, double smallest, double surge, int64_t window,
    std::optional<int64_t> restart_after, const Flag& ok);

}  // namespace kbfgs
