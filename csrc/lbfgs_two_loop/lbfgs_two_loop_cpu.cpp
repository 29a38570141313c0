// The choice between the two forms of (11), and the ring.
#include "lbfgs_two_loop.h"

#include <algorithm>

#include "../bfgs_update/bfgs_update.h"
#include "../common/vector_ops.h"

namespace kbfgs {

namespace {

// Whether the compact form is the faster one. It pays 4 f^2 n FLOPs for the Gram matrix before the
// first column, and its products want wide tiles; the recursion runs from the L2 cache. Microseconds,
// recursion/compact, float, one thread, AMD Zen 4 with MKL, n x columns at f pairs:
//   1000 x 64  f 20  181/160   1000 x 512 f 20  1433/954   500 x 256 f 20   354/247
//   1000 x 64  f 100 1054/1592 1000 x 512 f 100 6860/5532  500 x 256 f 100 1708/1623
//   250 x 512  f 20  298/259   2000 x 256 f 100 5679/6004  4000 x 1000 f 100 47755/42059
//   250 x 512  f 100 1372/1676 2000 x 1000 f 100 23659/20995
// Doubles gain nothing: 1000 x 512 f 20 2618/2843, f 100 13910/14599, 4000 x 1000 f 100 97237/119922.
template <typename T>
bool compact_is_faster(const TwoLoop<T>& l) {
  return sizeof(T) == sizeof(float) && l.ring.n >= 500 && l.columns >= 2 * l.ring.filled() + 128;
}

}  // namespace

template <typename T>
void two_loop(const std::vector<TwoLoop<T>>& layers, Form form) {
  std::vector<TwoLoop<T>> multiplied, swept;
  for (const auto& l : layers) {
    const bool by_products =
        form == Form::compact || (form == Form::automatic && compact_is_faster(l));
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
