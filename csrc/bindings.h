// What each family has to offer: functions <op>cpu in its bindings_cpu.cpp, <op>cuda in its
// bindings_cuda.cpp (pair_ema_cpu).
#pragma once

#include <utility>
#include <vector>

#include "common/call.h"

namespace kbfgs {

using Functions = std::vector<std::pair<const char*, void (*)(const Call&)>>;

Functions bfgs_update_ops();
Functions double_damping_ops();
Functions factor_ema_ops();
Functions kron_precondition_ops();
Functions lbfgs_two_loop_ops();
Functions safeguard_ops();
Functions spectral_ops();

namespace cuda {

Functions bfgs_update_ops();
Functions double_damping_ops();
Functions factor_ema_ops();
Functions kron_precondition_ops();
Functions lbfgs_two_loop_ops();
Functions safeguard_ops();
Functions spectral_ops();

}  // namespace cuda

}  // namespace kbfgs
