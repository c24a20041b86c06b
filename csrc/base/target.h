// Where a call runs.
#pragma once

#include "flash_attn/types.h"

namespace flash {

namespace cuda {
class Device;
}

// Looked up once a call.
struct Target {
  // Whose kernels serve the call: those of CUDA for CPU tensors that go to the emulated GPU.
  flash_attn_device_type device_type = FLASH_ATTN_CPU;
  int device_id = 0;
  int compute_capability = 0;      // 80, 90, ...; 0 on the CPU
  cuda::Device* device = nullptr;  // nullptr on the CPU
  void* stream = nullptr;          // a CUstream; ignored on the CPU
  bool is_emulated = false;
};

// Memory on the target that a kernel may use while it runs, as many bytes as it has asked for.
struct Workspace {
  void* ptr = nullptr;
  size_t bytes = 0;
};

}  // namespace flash
