// A Python module with the CUDA functions of kbfgs_ext._C, running on the host (cuda_host.h).
#include <pybind11/pybind11.h>

#include "common/python.h"

#define KBFGS_CUDA_HOST_TYPES
#include "cuda_host.h"

namespace kbfgs::cuda {
void bind(PyObject* module);  // bindings_cuda.cpp
}

PYBIND11_MODULE(KBFGS_HOST_MODULE, module) {
  kbfgs::cuda::bind(module.ptr());
  module.def("set_machine", [](int multiprocessors, int shared_bytes, bool backwards) {
    cuda_host::settings() = {multiprocessors, shared_bytes, backwards, {}, 0};
  });
  // (blocks, threads, shared bytes, cooperative) of every launch since set_machine.
  module.def("launches", [] {
    pybind11::list out;
    for (const cuda_host::Launch& l : cuda_host::settings().launches)
      out.append(pybind11::make_tuple(l.blocks, l.threads, l.shared_bytes, l.cooperative));
    return out;
  });
  module.def("products", [] { return cuda_host::settings().products; });
}
