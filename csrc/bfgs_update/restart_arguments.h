// A call of restart_ as layers.
#pragma once

#include <vector>

#include "../common/arguments.h"
#include "restart.h"

namespace kbfgs {

template <typename T>
std::vector<Restart<T>> restart_layers(Arguments<T>& args, size_t count) {
  std::vector<Restart<T>> layers(count);
  for (size_t i = 0; i < count; ++i) {
    Restart<T>& l = layers[i];
    l.marks = args.integers("marks", i, 3);
    l.counts = args.integers("counts", i, 4);
    if (args.given("force")) l.force = args.flags("force", i, 1);
    if (args.given("pushed")) {
      l.pushed = args.integers("pushed", i, 1);
      continue;
    }
    l.n = args.tensor("H", i).size(0);
    l.H = args.state("H", i, l.n * l.n);
    if (i >= args.count("lam")) continue;
    l.lam = args.scalar("lam", i);
    if (args.given("A")) {
      l.A = args.state("A", i, l.n * l.n);
    } else {
      const Strided<Numbers<T>> rows = args.rows("X", i, l.n);
      l.X = rows.data, l.m = rows.m, l.d_in = rows.columns, l.ld = rows.stride;
    }
  }
  return layers;
}

}  // namespace kbfgs
