// The choice between the two forms of (11), and the ring.
#include "lbfgs_two_loop.h"

#include <algorithm>

#include "../bfgs_update/bfgs_update.h"
#include "../common/vector_ops.h"

namespace kbfgs {

namespace {

constexpr int64_t kCompactColumns = 32;

}  // namespace

template <typename T>
void two_loop(const std::vector<TwoLoop<T>>& layers, Form form) {
  std::vector<TwoLoop<T>> multiplied, swept;
  for (const auto& l : layers) {
    const bool by_products =
        form == Form::compact || (form == Form::automatic && l.columns >= kCompactColumns);
    (by_products ? multiplied : swept).push_back(l);
  }
  compact(multiplied);
  recursion(swept);
}

template <typename T>
void push(const std::vector<Push<T>>& layers) {
  for (const auto& l : layers) {
    const Gate<T> g = gate(l.n, l.s, l.y, static_cast<const T*>(nullptr), l.c);  // (8)
    l.counts[g.accept ? kAccepted : kRejected] += 1;
    if (!g.accept) continue;
    const int64_t row = *l.pushed % l.p;
    std::copy(l.s, l.s + l.n, l.S + row * l.n);
    std::copy(l.y, l.y + l.n, l.Y + row * l.n);
    l.rho[row] = static_cast<T>(g.rho);
    *l.pushed += 1;
  }
}

#define KBFGS_INSTANTIATE(T)                                    \
  template void two_loop(const std::vector<TwoLoop<T>>&, Form); \
  template void push(const std::vector<Push<T>>&);
KBFGS_INSTANTIATE(float)
KBFGS_INSTANTIATE(double)
#undef KBFGS_INSTANTIATE

}  // namespace kbfgs
