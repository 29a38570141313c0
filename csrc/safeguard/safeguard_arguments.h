// A call of admit_ or judge_ as what it is about, and the rule.
#pragma once

#include <vector>

#include "../common/arguments.h"
#include "safeguard.h"

namespace kbfgs {

template <typename T>
std::vector<Admission<T>> admissions(Arguments<T>& args, const Tensors& norms) {
  std::vector<Admission<T>> out;
  for (size_t i = 0; i < norms.size(); ++i)
    out.push_back(
        {args.flags("sound", i, 1), args.integers("counts", i, 4),
         args.flags("decision", i, kDecisions), args.input("loss", i, 1),
         args.input("norms", i, norms[i].numel()), norms[i].numel()});
  return out;
}

template <typename T>
std::vector<Judge<T>> judgements(Arguments<T>& args, size_t count) {
  std::vector<Judge<T>> out;
  for (size_t i = 0; i < count; ++i)
    out.push_back(
        {args.state("scale", i, 1), args.state("watched", i, 4), args.integers("counts", i, 4),
         args.flags("decision", i, kDecisions), args.input("loss", i, 1), args.input("loss_next", i, 1),
         args.given("slope") ? args.input("slope", i, 1) : nullptr});
  return out;
}

inline JudgeRule judge_rule(const Call& call) {
  return {call.number("noise"), call.number("shrink"), call.number("grow"),
          call.number("sufficient"), call.number("smallest"), call.number("surge"),
          call.integer("window"), call.has("restart_after") ? call.integer("restart_after") : 0,
          call.integer("take") != 0};
}

}  // namespace kbfgs
