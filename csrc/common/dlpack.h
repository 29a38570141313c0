// What csrc uses of DLPack 1 (https://dmlc.github.io/dlpack): the layout of a tensor, and the table by
// which torch.Tensor.__dlpack_c_exchange_api__ hands one out. Fixed by its version; no torch has it in
// a header that may stand beside the stable ones.
#pragma once

#include <cstdint>

namespace kbfgs::dlpack {

enum DeviceType : int32_t { kCpuDevice = 1, kCudaDevice = 2 };
enum TypeCode : uint8_t { kInt = 0, kUint, kFloat, kOpaque, kBfloat, kComplex, kBool };

struct Device {
  int32_t type;  // a DeviceType, or another
  int32_t index;

  bool operator==(const Device&) const = default;
};

struct Dtype {
  uint8_t code;  // a TypeCode, or another
  uint8_t bits;
  uint16_t lanes;

  bool operator==(const Dtype&) const = default;
};

struct View {
  void* data;
  Device device;
  int32_t dim;
  Dtype dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr uint32_t kMajor = 1;

struct Table {
  uint32_t major, minor;
  const Table* older;  // of another major version, or null
  void* unused[3];
  int (*view)(void* py_object, View* out);  // nonzero: Python has an exception set
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace kbfgs::dlpack
