// Momentum (2), the step (4), its slope (13), the change of the output (15) and the step's undoing, each for
// all layers in one launch.
// Elements of n_g x n_a: momentum 3 read, 1 written; descend 2 read, 2 written; slope 3 read;
// output_change 2 read; restore 1 read and 1 written where it undoes, none where it does not.
#include "kron_precondition_cuda.h"

#include <algorithm>

#include "../common/matvec.cuh"

namespace kbfgs::cuda {

namespace {

struct ElementShape {
  static constexpr int kThreads = 128;
  // At least 16 warps per multiprocessor, each with 8 elements of 2 or 3 arrays under way. With 4 an
  // H100 moved 1.1 TB/s: a warp waits for its loads before it asks for the next.
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int kBlocksLaunched = 8;  // per multiprocessor, at most: float's registers allow it
};
constexpr int kInFlight = 8;

template <typename T>
struct ParameterTable {
  ParameterLayer<T> layer[kLayersPerLaunch];
  int layers;
  int64_t part;  // of all elements, per block
  const bool* flag;  // ok or undo
  T momentum, rest, weight_decay;
};

// Where an element of [W, b] lies.
struct Place {
  int64_t joined;
  int64_t at;  // in W or b
  int column;  // of [W, b]
  bool bias;
};

struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

// store(place, load(place)) for every element of this block's rows, kInFlight of a row loaded before
// the first is stored; after each row end_row(row), in all lanes of its warp. The rows of W and of
// [W, b] differ in length, so at most one of them is on the 16-byte grid: accesses of one element,
// coalesced.
template <typename T, typename Load, typename Store, typename EndRow = Nothing>
__device__ __forceinline__ void for_each_element(
    const ParameterLayer<T>& l, int64_t part, const Load& load, const Store& store,
    const EndRow& end_row = {}) {
  const RowShare share = row_share(l.n_g, l.n_a, l.before, part);
  for (int row = share.begin + warp_id(); row < share.end; row += warps_per_block()) {
    const int64_t joined = static_cast<int64_t>(row) * l.n_a;
    const int64_t weight = static_cast<int64_t>(row) * l.d_in;
    for (int j0 = lane_id(); j0 < l.d_in; j0 += kInFlight * kWarp) {
      decltype(load(Place{})) values[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int j = j0 + u * kWarp;
        if (j < l.d_in) values[u] = load(Place{joined + j, weight + j, j, false});
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int j = j0 + u * kWarp;
        if (j < l.d_in) store(Place{joined + j, weight + j, j, false}, values[u]);
      }
    }
    if (l.n_a > l.d_in && lane_id() == 0) {
      const Place bias{joined + l.d_in, row, l.d_in, true};
      store(bias, load(bias));
    }
    end_row(row);
  }
}

template <typename T>
__global__ void __launch_bounds__(
    ElementShape::kThreads, ElementShape::kBlocksPerMultiprocessor)
    momentum_kernel(const __grid_constant__ ParameterTable<T> t) {
  if (!flag(t.flag)) return;
  for (int i = 0; i < t.layers; ++i) {
    const ParameterLayer<T>& l = t.layer[i];
    l.visit_with_gradient([&](const auto& own) {
      for_each_element(
          l, t.part,
          [&](Place p) {
            const T parameter = widened(p.bias ? own.b[p.at] : own.W[p.at]);
            const T gradient = widened(p.bias ? own.db[p.at] : own.dW[p.at]);
            const T D = gradient + t.weight_decay * parameter;
            return t.momentum * l.joined[p.joined] + t.rest * D;
          },
          [&](Place p, T average) { l.joined[p.joined] = average; });
    });
  }
}

template <typename T>
struct Step {
  T before, after;
};

template <typename T>
__global__ void __launch_bounds__(
    ElementShape::kThreads, ElementShape::kBlocksPerMultiprocessor)
    descend_kernel(const __grid_constant__ ParameterTable<T> t) {
  const bool ok = flag(t.flag);
  for (int i = 0; i < t.layers; ++i) {
    const ParameterLayer<T>& l = t.layer[i];
    const T step_size = static_cast<T>(*l.step_size);
    l.visit([&](const auto& own) {
      for_each_element(
          l, t.part,
          [&](Place p) {
            const T before = widened(p.bias ? own.b[p.at] : own.W[p.at]);
            return Step<T>{before, before - step_size * l.joined[p.joined]};
          },
          [&](Place p, Step<T> step) {
            if (ok) round_to(p.bias ? own.b[p.at] : own.W[p.at], step.after);
            l.joined[p.joined] = step.before;
          });
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(
    ElementShape::kThreads, ElementShape::kBlocksPerMultiprocessor)
    slope_kernel(const __grid_constant__ ParameterTable<T> t) {
  for (int i = 0; i < t.layers; ++i) {
    const ParameterLayer<T>& l = t.layer[i];
    T sum = 0;
    l.visit_with_gradient([&](const auto& own) {
      for_each_element(
          l, t.part,
          [&](Place p) {
            const T moved = widened(p.bias ? own.b[p.at] : own.W[p.at]) - l.joined[p.joined];
            return widened(p.bias ? own.db[p.at] : own.dW[p.at]) * moved;
          },
          [&](Place, T product) { sum += product; },
          [&](int row) {
            const T total = warp_sum(sum);
            if (lane_id() == 0) l.row_sums[row] = total;
            sum = 0;
          });
    });
  }
}

// W and `joined` are read once; a_bar and a_bar_next again for every row, from the L1.
template <typename T>
__global__ void __launch_bounds__(
    ElementShape::kThreads, ElementShape::kBlocksPerMultiprocessor)
    output_change_kernel(const __grid_constant__ ParameterTable<T> t) {
  for (int i = 0; i < t.layers; ++i) {
    const ParameterLayer<T>& l = t.layer[i];
    T sum = 0;
    l.visit([&](const auto& own) {
      for_each_element(
          l, t.part,
          [&](Place p) {
            const T before = l.joined[p.joined], next = l.a_bar_next[p.column];
            const T moved = widened(p.bias ? own.b[p.at] : own.W[p.at]) - before;
            return moved * next + before * (next - l.a_bar[p.column]);
          },
          [&](Place, T term) { sum += term; },
          [&](int row) {
            const T total = warp_sum(sum);
            if (lane_id() == 0) l.row_sums[row] = total;
            sum = 0;
          });
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(
    ElementShape::kThreads, ElementShape::kBlocksPerMultiprocessor)
    restore_kernel(const __grid_constant__ ParameterTable<T> t) {
  if (!*t.flag) return;
  for (int i = 0; i < t.layers; ++i) {
    const ParameterLayer<T>& l = t.layer[i];
    l.visit([&](const auto& own) {
      for_each_element(
          l, t.part, [&](Place p) { return l.joined[p.joined]; },
          [&](Place p, T saved) { round_to(p.bias ? own.b[p.at] : own.W[p.at], saved); });
    });
  }
}

template <typename T>
void launch_elements(
    void (*kernel)(ParameterTable<T>), const std::vector<ParameterLayer<T>>& layers,
    const ParameterTable<T>& model, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    ParameterTable<T> t = model;
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    int64_t rows = 0, total = 0;
    for (int i = 0; i < t.layers; ++i) {
      t.layer[i] = layers[begin + i];
      t.layer[i].before = total;
      total += int64_t(t.layer[i].n_g) * t.layer[i].n_a;
      rows += t.layer[i].n_g;
    }
    constexpr int kWarps = ElementShape::kThreads / kWarp;
    const int64_t most =
        int64_t(device_limits().multiprocessors) * ElementShape::kBlocksLaunched;
    const int64_t blocks = std::min<int64_t>(most, (rows + kWarps - 1) / kWarps);
    t.part = equal_part(total, blocks);
    launch(kernel, {unsigned(blocks), ElementShape::kThreads, 0, false}, stream, t);
  }
}

}  // namespace

template <typename T>
void momentum(
    std::vector<ParameterLayer<T>> layers, double momentum, double weight_decay, const bool* ok,
    cudaStream_t stream) {
  ParameterTable<T> t{};
  t.flag = ok;
  t.momentum = static_cast<T>(momentum);
  t.rest = static_cast<T>(1 - momentum);
  t.weight_decay = static_cast<T>(weight_decay);
  launch_elements(&momentum_kernel<T>, layers, t, stream);
}

template <typename T>
void descend(std::vector<ParameterLayer<T>> layers, const bool* ok, cudaStream_t stream) {
  ParameterTable<T> t{};
  t.flag = ok;
  launch_elements(&descend_kernel<T>, layers, t, stream);
}

template <typename T>
void slope(std::vector<ParameterLayer<T>> layers, cudaStream_t stream) {
  ParameterTable<T> t{};
  launch_elements(&slope_kernel<T>, layers, t, stream);
}

template <typename T>
void output_change(std::vector<ParameterLayer<T>> layers, cudaStream_t stream) {
  ParameterTable<T> t{};
  launch_elements(&output_change_kernel<T>, layers, t, stream);
}

template <typename T>
void restore(std::vector<ParameterLayer<T>> layers, const bool* undo, cudaStream_t stream) {
  ParameterTable<T> t{};
  t.flag = undo;
  launch_elements(&restore_kernel<T>, layers, t, stream);
}

template void momentum<float>(
    std::vector<ParameterLayer<float>>, double, double, const bool*, cudaStream_t);
template void momentum<double>(
    std::vector<ParameterLayer<double>>, double, double, const bool*, cudaStream_t);
template void descend<float>(
    std::vector<ParameterLayer<float>>, const bool*, cudaStream_t);
template void descend<double>(
    std::vector<ParameterLayer<double>>, const bool*, cudaStream_t);
template void slope<float>(std::vector<ParameterLayer<float>>, cudaStream_t);
template void slope<double>(std::vector<ParameterLayer<double>>, cudaStream_t);
template void output_change<float>(std::vector<ParameterLayer<float>>, cudaStream_t);
template void output_change<double>(std::vector<ParameterLayer<double>>, cudaStream_t);
template void restore<float>(
    std::vector<ParameterLayer<float>>, const bool*, cudaStream_t);
template void restore<double>(
    std::vector<ParameterLayer<double>>, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
