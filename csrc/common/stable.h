// torch as csrc sees it: its stable C interface alone, so that a binary serves every torch from the
// one named here on, whichever it was built with. No other file includes anything of torch's C++.
#pragma once

#define KBFGS_TORCH_MAJOR 2
#define KBFGS_TORCH_MINOR 11
#define TORCH_TARGET_VERSION ((KBFGS_TORCH_MAJOR + 0ULL) << 56 | (KBFGS_TORCH_MINOR + 0ULL) << 48)

#ifdef KBFGS_WITH_CUDA
#define USE_CUDA  // declares what libtorch_cuda has
#endif

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef KBFGS_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif
