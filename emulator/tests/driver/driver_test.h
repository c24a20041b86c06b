#pragma once

#include <gtest/gtest.h>

#include <string>

#include "driver/cuda_api.h"
#include "gpu_emulator/gpu_emulator.h"

namespace gpu_emulator::testing_support {

inline constexpr int kA100 = 0, kH100 = 1;

inline std::string last_report(int device) {
  std::string text(gpuEmulatorLastReport(device, nullptr, 0), '\0');
  gpuEmulatorLastReport(device, text.data(), text.size() + 1);
  return text;
}

inline std::string name_of(CUresult result) {
  const char* name = nullptr;
  return cuGetErrorName(result, &name) == CUDA_SUCCESS ? name : std::to_string(result);
}

// Compares results by name; more may be streamed to it.
#define EXPECT_CU(expected, call) EXPECT_EQ(name_of(call), name_of(expected))
#define ASSERT_CU(expected, call) ASSERT_EQ(name_of(call), name_of(expected))

// A test with a device's primary context current.
class DriverTest : public ::testing::Test {
 protected:
  explicit DriverTest(int device = kA100) : device_(device) {}

  void SetUp() override {
    ASSERT_CU(CUDA_SUCCESS, cuInit(0));
    ASSERT_CU(CUDA_SUCCESS, cuDevicePrimaryCtxRetain(&context_, device_));
    ASSERT_CU(CUDA_SUCCESS, cuCtxSetCurrent(context_));
  }
  void TearDown() override {
    cuCtxSetCurrent(nullptr);
    cuDevicePrimaryCtxRelease(device_);
  }

  CUfunction load(const char* ptx, const char* kernel) {
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    EXPECT_CU(CUDA_SUCCESS, cuModuleLoadData(&module, ptx)) << last_report(device_);
    EXPECT_CU(CUDA_SUCCESS, cuModuleGetFunction(&function, module, kernel));
    return function;
  }
  CUdeviceptr allocate(size_t bytes) {
    CUdeviceptr pointer = 0;
    EXPECT_CU(CUDA_SUCCESS, cuMemAlloc(&pointer, bytes));
    return pointer;
  }
  std::string report() const { return last_report(device_); }

  int device_;
  CUcontext context_ = nullptr;
};

class HopperDriverTest : public DriverTest {
 protected:
  HopperDriverTest() : DriverTest(kH100) {}
};

// y[i] += a * x[i] for i < n
inline constexpr const char* kAxpy = R"(
.version 8.0
.target sm_80
.address_size 64
.global .align 4 .u32 launches = 5;
.visible .entry axpy(.param .u64 y, .param .u64 x, .param .f32 a, .param .u32 n) {
  .reg .pred %p; .reg .b32 %r<8>; .reg .b64 %rd<6>; .reg .f32 %f<4>;
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
  mad.lo.s32 %r4, %r1, %r2, %r3;
  ld.param.u32 %r5, [n];
  setp.ge.u32 %p, %r4, %r5;
  @%p bra DONE;
  ld.param.u64 %rd1, [y]; ld.param.u64 %rd2, [x]; ld.param.f32 %f1, [a];
  mul.wide.u32 %rd3, %r4, 4;
  add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  ld.global.f32 %f2, [%rd4]; ld.global.f32 %f3, [%rd5];
  fma.rn.f32 %f2, %f1, %f3, %f2;
  st.global.f32 [%rd4], %f2;
DONE:
  ret;
}
.visible .entry bounded(.param .u32 unused) .maxntid 64, 1, 1 {
  .shared .align 16 .b8 buffer[1024];
  ret;
}
.visible .entry fixed() .reqntid 32 { ret; }
)";

}  // namespace gpu_emulator::testing_support
