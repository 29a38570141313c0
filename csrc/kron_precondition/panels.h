// The tiles of layers whose factors are block-diagonal, as few products: those that share H_g lie side by
// side in M, those that share H_a one below the other in P, and each such panel is one product. A layer
// of g and a blocks has g*a tiles, and takes g + a products in place of 2*g*a.
#pragma once

#include <algorithm>
#include <vector>

#include "kron_precondition.h"

namespace kbfgs {

// Panels of the left products, work = H_g M, or P without H_a.
template <typename T>
std::vector<Precondition<T>> side_by_side(const std::vector<Precondition<T>>& tiles) {
  std::vector<Precondition<T>> panels;
  for (const auto& t : tiles) {
    if (!panels.empty()) {
      auto& p = panels.back();
      const bool rows = t.H_g == p.H_g && t.n_g == p.n_g;
      const bool strides = t.ld_M == p.ld_M && t.ld_product() == p.ld_product();
      if (rows && strides && t.M == p.M + p.n_a && t.product() == p.product() + p.n_a) {
        p.n_a += t.n_a;
        continue;
      }
    }
    panels.push_back(t);
  }
  return panels;
}

// Panels of the right products, P = (H_g M) H_a. A tile's neighbour above is one of the last
// kNeighbours panels, where it has one.
template <typename T>
std::vector<Precondition<T>> one_below_the_other(const std::vector<Precondition<T>>& tiles) {
  constexpr std::ptrdiff_t kNeighbours = 64;
  std::vector<Precondition<T>> panels;
  for (const auto& t : tiles) {
    const auto continues = [&t](const Precondition<T>& p) {
      const bool columns = t.H_a == p.H_a && t.n_a == p.n_a;
      const bool strides = t.ld_P == p.ld_P && t.ld_left() == p.ld_left();
      return columns && strides && t.P == p.P + p.n_g * p.ld_P &&
             t.left() == p.left() + p.n_g * p.ld_left();
    };
    const auto last = panels.rbegin(), first = last + std::min(panels.rend() - last, kNeighbours);
    const auto above = std::find_if(last, first, continues);
    if (above != first)
      above->n_g += t.n_g;
    else
      panels.push_back(t);
  }
  return panels;
}

}  // namespace kbfgs
