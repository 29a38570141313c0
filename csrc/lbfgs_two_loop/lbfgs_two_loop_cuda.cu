// out = H Q by the two-loop recursion (11), all 2p sweeps for all columns of all layers in one launch.
//
// Columns are independent. A team (a warp, or a whole block for a vector or a long column) keeps its
// columns of Q in registers from the first sweep to the last; a sweep is a dot product with one row of
// S or Y and a multiple of another added. Q is read and out written once, 2 n columns elements; S and
// Y stream through L2, 4 p n elements per team; 8 p n FLOPs per column. Ring position and number of
// pairs are read on the device.
#include "lbfgs_two_loop_cuda.h"

#include <algorithm>

#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

constexpr int kThreads = 256;

// How columns of up to kTeam*kPer elements are held: kColumns of them in kPer registers each per
// thread. More columns reuse a loaded element of S or Y; kPer*kColumns is what registers allow.
template <int kTeam_, int kPer_, int kColumns_>
struct Holding {
  static constexpr int kTeam = kTeam_, kPer = kPer_, kColumns = kColumns_;
  static constexpr int kLongest = kTeam * kPer;
  static constexpr int kTeams = kThreads / kTeam;  // per block
  static constexpr int kPerBlock = kTeams * kColumns;
};
using Short = Holding<32, 4, 4>;     // n <= 128
using Medium = Holding<32, 16, 2>;   // n <= 512
using Long = Holding<32, 32, 1>;     // n <= 1024: the paper's layers
using Longer = Holding<256, 8, 2>;   // n <= 2048
using Longest = Holding<256, 32, 1>; // n <= 8192
using Vector = Holding<256, 4, 1>;   // one column, n <= 1024: a block has shorter sweeps than a warp

enum class Kind { kShort, kMedium, kLong, kLonger, kLongest, kVector, kNone };

Kind kind_of(int64_t n, int64_t columns) {
  if (columns == 1 && n > Short::kLongest && n <= Vector::kLongest) return Kind::kVector;
  if (n <= Short::kLongest) return Kind::kShort;
  if (n <= Medium::kLongest) return Kind::kMedium;
  if (n <= Long::kLongest) return Kind::kLong;
  if (n <= Longer::kLongest) return Kind::kLonger;
  return n <= Longest::kLongest ? Kind::kLongest : Kind::kNone;
}

template <typename T>
struct RingTable {
  RingLayer<T> layer[kLayersPerLaunch];
  Kind kind[kLayersPerLaunch];
  int layers;
};

template <int kTeam, int kN, typename T>
__device__ __forceinline__ void team_sum(T (&x)[kN], T* room) {
  if constexpr (kTeam == kWarp) {
#pragma unroll
    for (int k = 0; k < kN; ++k) x[k] = warp_sum(x[k]);
  } else {
    block_sum(x, room);
  }
}

template <typename H, typename T>
__device__ __forceinline__ void recursion(const RingLayer<T>& l, int tile, T* shared) {
  const int team = threadIdx.x / H::kTeam, t = threadIdx.x % H::kTeam;
  const int column0 = (tile * H::kTeams + team) * H::kColumns;
  T* room = shared;  // kColumns per warp
  T* alpha = shared + H::kColumns * (kThreads / kWarp) + int64_t(team) * l.p * H::kColumns;

  T q[H::kColumns][H::kPer];
#pragma unroll
  for (int k = 0; k < H::kPer; ++k) {
    const int i = t + k * H::kTeam;
#pragma unroll
    for (int c = 0; c < H::kColumns; ++c) {
      const bool inside = i < l.n && column0 + c < l.columns;
      q[c][k] = inside ? l.Q[i * l.ld + column0 + c] : T(0);
    }
  }

  // x'Q for a row x of S or Y.
  auto dots = [&](const T* x, T(&sum)[H::kColumns]) {
#pragma unroll
    for (int c = 0; c < H::kColumns; ++c) sum[c] = T(0);
#pragma unroll
    for (int k = 0; k < H::kPer; ++k) {
      const int i = t + k * H::kTeam;
      const T x_i = i < l.n ? x[i] : T(0);
#pragma unroll
      for (int c = 0; c < H::kColumns; ++c) sum[c] += x_i * q[c][k];
    }
    team_sum<H::kTeam>(sum, room);
  };
  // Q + x*factor'
  auto add = [&](const T* x, const T(&factor)[H::kColumns]) {
#pragma unroll
    for (int k = 0; k < H::kPer; ++k) {
      const int i = t + k * H::kTeam;
      const T x_i = i < l.n ? x[i] : T(0);
#pragma unroll
      for (int c = 0; c < H::kColumns; ++c) q[c][k] += x_i * factor[c];
    }
  };

  const int64_t pushed = *l.pushed;
  const int pairs = pushed < l.p ? int(pushed) : l.p;
  const int newest = pairs ? int((pushed - 1) % l.p) : 0;
  for (int age = 0; age < pairs; ++age) {  // newest to oldest
    const int row = newest >= age ? newest - age : newest - age + l.p;
    T factor[H::kColumns];
    dots(l.S + int64_t(row) * l.n, factor);
    const T rho = l.rho[row];
#pragma unroll
    for (int c = 0; c < H::kColumns; ++c) {
      factor[c] *= rho;
      if (t == 0) alpha[age * H::kColumns + c] = factor[c];
      factor[c] = -factor[c];
    }
    add(l.Y + int64_t(row) * l.n, factor);
  }
  __syncthreads();  // alpha
  for (int age = pairs - 1; age >= 0; --age) {  // oldest to newest
    const int row = newest >= age ? newest - age : newest - age + l.p;
    T factor[H::kColumns];
    dots(l.Y + int64_t(row) * l.n, factor);
    const T rho = l.rho[row];
#pragma unroll
    for (int c = 0; c < H::kColumns; ++c) {
      factor[c] = alpha[age * H::kColumns + c] - rho * factor[c];
    }
    add(l.S + int64_t(row) * l.n, factor);
  }

#pragma unroll
  for (int k = 0; k < H::kPer; ++k) {
    const int i = t + k * H::kTeam;
#pragma unroll
    for (int c = 0; c < H::kColumns; ++c) {
      if (i < l.n && column0 + c < l.columns) l.out[i * l.ld_out + column0 + c] = q[c][k];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) two_loop_kernel(
    const __grid_constant__ RingTable<T> t) {
  int i = 0;
  while (i + 1 < t.layers && t.layer[i + 1].blocks_before <= int(blockIdx.x)) ++i;
  const RingLayer<T>& l = t.layer[i];
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int tile = int(blockIdx.x) - l.blocks_before;
  switch (t.kind[i]) {
    case Kind::kShort: return recursion<Short>(l, tile, shared);
    case Kind::kMedium: return recursion<Medium>(l, tile, shared);
    case Kind::kLong: return recursion<Long>(l, tile, shared);
    case Kind::kLonger: return recursion<Longer>(l, tile, shared);
    case Kind::kLongest: return recursion<Longest>(l, tile, shared);
    case Kind::kVector: return recursion<Vector>(l, tile, shared);
    case Kind::kNone: return;
  }
}

// Columns of a block, by kind.
constexpr int kColumnsPerBlock[] = {
    Short::kPerBlock,   Medium::kPerBlock, Long::kPerBlock, Longer::kPerBlock,
    Longest::kPerBlock, Vector::kPerBlock, 1};

// The sums of a block-wide team (at most Longer::kColumns per warp, Short's are not used) and alpha.
int64_t shared_elements(int64_t columns_per_block, int64_t p) {
  return Short::kColumns * (kThreads / kWarp) + p * columns_per_block;
}

}  // namespace

bool two_loop_fits(int64_t n, int64_t columns, int64_t p, int64_t element_bytes) {
  const Kind kind = kind_of(n, columns);
  return kind != Kind::kNone &&
         shared_elements(kColumnsPerBlock[int(kind)], p) * element_bytes <=
             device_limits().shared_bytes;
}

template <typename T>
void two_loop(std::vector<RingLayer<T>> layers, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    RingTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    int64_t blocks = 0, shared = 0;
    for (int i = 0; i < t.layers; ++i) {
      RingLayer<T>& l = t.layer[i] = layers[begin + i];
      t.kind[i] = kind_of(l.n, l.columns);
      l.blocks_before = int(blocks);
      const int per_block = kColumnsPerBlock[int(t.kind[i])];
      blocks += (l.columns + per_block - 1) / per_block;
      shared = std::max(shared, shared_elements(per_block, l.p));
    }
    launch(
        &two_loop_kernel<T>,
        {unsigned(blocks), kThreads, unsigned(shared * int64_t(sizeof(T))), false}, stream, t);
  }
}

template void two_loop<float>(std::vector<RingLayer<float>>, cudaStream_t);
template void two_loop<double>(std::vector<RingLayer<double>>, cudaStream_t);

}  // namespace kbfgs::cuda
