// What csrc calls of libtorch_cuda, on the host.
#include "common/stable.h"
#include "cuda_host.h"

extern "C" {

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_cuda_mm_out(
    AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right) {
  ++cuda_host::settings().products;
  return aoti_torch_cpu_mm_out(out, left, right);
}

}  // extern "C"
