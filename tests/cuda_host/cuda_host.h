// CUDA on the host, for tests: the names that csrc/**/*.cu and csrc/common/device.cuh use, so that the
// kernels compile as C++ and run. A CUDA thread is a fiber with a stack of its own; all fibers of a
// grid live in one scheduler, so a run is deterministic. A barrier that not all threads reach is
// reported as a deadlock. Shared memory is malloc'ed per block at its exact size and filled with NaN,
// so that AddressSanitizer sees an access past it and the results an uninitialised read.
//
// Not covered: races that need two threads to run at the same time (fibers switch at barriers and
// shuffles only; the order in which they run can be turned round, which finds missing barriers),
// memory-model effects, and anything about speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "../../csrc/common/launch_shape.h"

using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_host {

struct Launch {
  unsigned blocks, threads, shared_bytes;
  bool cooperative;
};

// What a test may set: the machine, and the order in which the fibers of a round run.
struct Settings {
  int multiprocessors = 3;
  int shared_bytes = 64 * 1024;
  bool backwards = false;
  std::vector<Launch> launches;  // since the settings were set
  int products = 0;              // of cuBLAS, the same
};
Settings& settings();

struct Warp {
  static constexpr int kLanes = 32;
  alignas(16) unsigned char values[2][kLanes * 16];
  int arrived = 0;
  uint64_t generation = 0;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
  Barrier barrier;
};

struct Thread {  // the fiber that runs now
  dim3 threadIdx, blockIdx, blockDim, gridDim;
  Block* block = nullptr;
};
extern Thread* current;

void yield();                                      // let the other fibers run
void wait(Barrier& barrier, int participants);     // returns when all have come
Barrier& grid_barrier();
void progress();
void run_grid(unsigned blocks, unsigned threads, unsigned shared_bytes, const std::function<void()>&);

// What all lanes of a warp hold, good until this lane's next exchange. Two buffers, used in turn: a
// lane that runs ahead writes the other one, and cannot get two exchanges ahead.
template <typename T>
const T* gather(T value) {
  static_assert(sizeof(T) <= 16);
  const int thread = static_cast<int>(current->threadIdx.x);
  Warp& warp = current->block->warps[thread / Warp::kLanes];
  const uint64_t generation = warp.generation;
  T* buffer = reinterpret_cast<T*>(warp.values[generation % 2]);
  std::memcpy(static_cast<void*>(buffer + thread % Warp::kLanes), &value, sizeof(T));
  progress();
  if (++warp.arrived == Warp::kLanes) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
  return buffer;
}

template <typename T>
T exchange(T value, int source) {
  return gather(value)[source];
}

}  // namespace cuda_host

#ifndef KBFGS_CUDA_HOST_TYPES  // torch's headers have names like these

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (cuda_host::current->threadIdx)
#define blockIdx (cuda_host::current->blockIdx)
#define blockDim (cuda_host::current->blockDim)
#define gridDim (cuda_host::current->gridDim)

using std::max;
using std::min;

inline void __syncthreads() {
  cuda_host::wait(cuda_host::current->block->barrier, static_cast<int>(blockDim.x));
}

inline void __syncwarp() {
  cuda_host::exchange(0, static_cast<int>(threadIdx.x) % cuda_host::Warp::kLanes);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange(value, (static_cast<int>(threadIdx.x) % cuda_host::Warp::kLanes) ^ mask);
}

namespace kbfgs::cuda {

struct LaunchShape;

inline unsigned char* shared_memory() { return cuda_host::current->block->shared; }
inline void grid_sync() {
  cuda_host::wait(cuda_host::grid_barrier(), static_cast<int>(gridDim.x * blockDim.x));
}

inline float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline double product(double a, double b) { return a * b; }

inline DeviceLimits device_limits() {
  return {cuda_host::settings().multiprocessors, cuda_host::settings().shared_bytes};
}

template <typename Parameters>
void launch(
    void (*kernel)(Parameters), const LaunchShape& shape, cudaStream_t, const Parameters& p) {
  static_assert(sizeof(Parameters) <= kParameterLimit);
  if (shape.blocks == 0) return;
  if (static_cast<int>(shape.shared_bytes) > cuda_host::settings().shared_bytes)
    throw std::runtime_error("a block asks for more shared memory than there is");
  if (shape.threads % 32 != 0 || shape.threads > 1024) throw std::runtime_error("bad block size");
  if (shape.cooperative && shape.blocks > 3u * cuda_host::settings().multiprocessors)
    throw std::runtime_error("more blocks than fit at once in a cooperative launch");
  cuda_host::settings().launches.push_back(
      {shape.blocks, shape.threads, shape.shared_bytes, shape.cooperative});
  cuda_host::run_grid(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(p); });
}

}  // namespace kbfgs::cuda

#endif  // KBFGS_CUDA_HOST_TYPES
