// The shape of a kernel launch, and what a launch can carry.
#pragma once

namespace kbfgs::cuda {

// Layers per launch: the table travels in the kernel parameters (at most 32,764 bytes since CUDA
// 12.1; 64 entries of the largest kind take 17 KB), so that nothing is uploaded and graphs capture it.
constexpr int kLayersPerLaunch = 64;
constexpr int kParameterLimit = 32764;

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  unsigned shared_bytes;
  bool cooperative;  // all blocks resident at once, so that grid_sync works
};

// Multiprocessors and the shared memory that one block may ask for, of the current device.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;
};

}  // namespace kbfgs::cuda
