// Calls of measure_inputs_ and measure_pair_ as layers.
#pragma once

#include <stdexcept>
#include <vector>

#include "../common/arguments.h"
#include "measure.h"

namespace kbfgs {

template <typename T>
std::vector<MeasureInputs<T>> inputs_of(Arguments<T>& args, const Call& call) {
  const size_t count = call.tensors("norms").size();
  const auto& elements = call.numbers("elements");
  if (elements.size() != count) throw std::invalid_argument("elements must have one entry per layer");
  std::vector<MeasureInputs<T>> out;
  for (size_t i = 0; i < count; ++i)
    out.push_back(
        {args.scalar("v", i), args.scalar("lam_a", i),
         args.input("norms", i, 1), args.scalar("damping", i), elements[i]});
  return out;
}

template <typename T>
std::vector<MeasurePair<T>> pairs_of(Arguments<T>& args, const Tensors& g_bar) {
  std::vector<MeasurePair<T>> out;
  for (size_t i = 0; i < g_bar.size(); ++i) {
    const int64_t n = g_bar[i].numel();
    out.push_back(
        {args.scalar("ss", i), args.scalar("yy", i),
         args.state("g_bar", i, n), args.state("g_bar_next", i, n), args.input("h_change", i, n),
         int(n)});
  }
  return out;
}

}  // namespace kbfgs
