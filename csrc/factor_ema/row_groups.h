// Groups of rows of several layers' X as work units, with one vector of partial sums per group.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../common/parallel.h"
#include "../common/pieces.h"
#include "factor_ema.h"

namespace kbfgs {

constexpr int64_t kGroup = 64;  // rows: 256 KB of float at 1000 columns, some 10 us of work

// Rows [row, row + count) of X from column `first` on, widened, without gaps.
template <typename T>
void widen_rows(const Rows<T>& r, int64_t row, int64_t count, int64_t first, T* to) {
  const int64_t width = r.cols - first;
  for (int64_t i = 0; i < count; ++i)
    widen(r.X, (row + i) * r.stride + first, width, to + i * width);
}

// Calls body(X, row stride, rows) for these rows as T: where they lie, or widened eight at a time,
// which are 32 KB of float at 1000 columns.
template <typename T, class Body>
void by_widened_rows(const Rows<T>& r, int64_t row, int64_t count, const Body& body) {
  constexpr int64_t kRows = 8;
  if (r.X.own()) return body(r.X.as_own() + row * r.stride, r.stride, count);
  const std::unique_ptr<T[]> room(new T[kRows * r.cols]);
  for (const int64_t end = row + count; row < end; row += kRows) {
    const int64_t some = std::min(kRows, end - row);
    widen_rows(r, row, some, 0, room.get());
    body(static_cast<const T*>(room.get()), r.cols, some);
  }
}

// Calls body(layer, first row, rows, partial) for every group; partial has `width(layer)` elements.
// Then, when a layer's groups are done, done(layer, partial vectors, their number).
template <typename T, class Width, class Body, class Done>
void row_groups(
    const std::vector<Rows<T>>& layers, const Width& width, const Body& body, const Done& done) {
  struct Group {
    int64_t layer, row;
  };
  std::vector<Group> groups;
  std::vector<int64_t> first, offset;
  int64_t elements = 0, work = 0;
  for (int64_t l = 0; l < static_cast<int64_t>(layers.size()); ++l) {
    first.push_back(static_cast<int64_t>(groups.size()));
    offset.push_back(elements);
    work += layers[l].m * layers[l].cols;
    for (int64_t row = 0; row < layers[l].m; row += kGroup) {
      groups.push_back({l, row});
      elements += width(l);
    }
  }
  first.push_back(static_cast<int64_t>(groups.size()));
  const std::unique_ptr<T[]> partial(new T[elements]);
  std::vector<std::atomic<int64_t>> left(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) left[l] = first[l + 1] - first[l];

  parallel_units(static_cast<int64_t>(groups.size()), work, [&](int64_t unit) {
    const auto [l, row] = groups[unit];
    T* own = partial.get() + offset[l] + (unit - first[l]) * width(l);
    body(l, row, std::min(kGroup, layers[l].m - row), own);
    if (left[l].fetch_sub(1, std::memory_order_acq_rel) == 1)
      done(l, partial.get() + offset[l], first[l + 1] - first[l]);
  });
}

}  // namespace kbfgs
