// Device memory that nobody has written: what allocations, copies, fills and launches leave.

#include <vector>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

class Definedness : public DriverTest {
 protected:
  void SetUp() override {
    DriverTest::SetUp();
    axpy_ = load(kAxpy, "axpy");
    ASSERT_CU(CUDA_SUCCESS, cuMemAlloc(&y_, kBytes));
    ASSERT_CU(CUDA_SUCCESS, cuMemAlloc(&x_, kBytes));
    ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(y_, 0, kBytes));
  }
  void TearDown() override {
    EXPECT_CU(CUDA_SUCCESS, gpu_result(gpuEmulatorSetOption(device_, "checks", "all")));
    cuMemFree(x_);
    cuMemFree(y_);
    DriverTest::TearDown();
  }

  static CUresult gpu_result(int result) { return static_cast<CUresult>(result); }
  CUresult run(CUdeviceptr y, CUdeviceptr x, uint32_t n = kCount) {
    void* params[] = {&y, &x, &a_, &n};
    return cuLaunchKernel(axpy_, (kCount + 63) / 64, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr);
  }
  void expect_undefined(CUresult result) {
    EXPECT_CU(CUDA_ERROR_LAUNCH_FAILED, result);
    EXPECT_NE(report().find("global memory at 0x"), std::string::npos) << report();
    EXPECT_NE(report().find("never written"), std::string::npos) << report();
  }

  static constexpr uint32_t kCount = 1000;
  static constexpr size_t kBytes = 4 * kCount;
  CUfunction axpy_ = nullptr;
  CUdeviceptr y_ = 0, x_ = 0;
  float a_ = 0.5f;
};

TEST_F(Definedness, NewMemoryIsUndefined) { expect_undefined(run(y_, x_)); }

TEST_F(Definedness, FillsAndCopiesFromTheHostDefine) {
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD32(x_, 0, kCount / 2));
  expect_undefined(run(y_, x_));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_, kCount / 2)) << report();
  const std::vector<float> rest(kCount - kCount / 2, 2.0f);
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyHtoD(x_ + 4 * (kCount / 2), rest.data(), 4 * rest.size()));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_)) << report();
}

TEST_F(Definedness, OneByteMissingIsNoticed) {
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(x_, 0, 2001));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(x_ + 2002, 0, kBytes - 2002));
  expect_undefined(run(y_, x_));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(x_ + 2001, 0, 1));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_)) << report();
}

TEST_F(Definedness, CopiesBetweenAllocationsCarryIt) {
  CUdeviceptr copy = allocate(kBytes);
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(x_, 0, kBytes - 4));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(copy, 0, kBytes));
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoD(copy, x_, kBytes));
  expect_undefined(run(y_, copy));
  EXPECT_CU(CUDA_SUCCESS, run(y_, copy, kCount - 1)) << report();
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoD(copy + kBytes - 4, y_, 4));
  EXPECT_CU(CUDA_SUCCESS, run(y_, copy)) << report();
  cuMemFree(copy);
}

TEST_F(Definedness, KernelsDefineWhatTheyWrite) {
  // y of the first launch is x of the second.
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8(x_, 0, kBytes / 2));
  CUfunction set = load(R"(
.version 8.0
.target sm_80
.address_size 64
.visible .entry set(.param .u64 p) {
  .reg .b32 %r<4>; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x; add.u32 %r2, %r1, 500; ld.param.u64 %rd1, [p];
  mul.wide.u32 %rd2, %r2, 4; add.s64 %rd2, %rd1, %rd2;
  st.global.u32 [%rd2], %r1;
  ret;
})",
                        "set");
  void* params[] = {&x_};
  ASSERT_CU(CUDA_SUCCESS, cuLaunchKernel(set, 1, 1, 1, 499, 1, 1, 0, nullptr, params, nullptr));
  expect_undefined(run(y_, x_));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_, kCount - 1)) << report();
}

// Writes are not followed without the checks: nothing is known about memory afterwards.
TEST_F(Definedness, ALaunchWithoutChecksMayHaveDefinedAnything) {
  EXPECT_CU(CUDA_SUCCESS, gpu_result(gpuEmulatorSetOption(device_, "checks", "memory")));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_)) << report();
  EXPECT_CU(CUDA_SUCCESS, gpu_result(gpuEmulatorSetOption(device_, "checks", "all")));
  EXPECT_CU(CUDA_SUCCESS, run(y_, x_)) << report();
}

TEST_F(Definedness, MemoryThatTheHostSeesIsDefined) {
  void* pinned = nullptr;
  CUdeviceptr managed = 0;
  ASSERT_CU(CUDA_SUCCESS, cuMemHostAlloc(&pinned, kBytes, 0));
  ASSERT_CU(CUDA_SUCCESS, cuMemAllocManaged(&managed, kBytes, CU_MEM_ATTACH_GLOBAL));
  EXPECT_CU(CUDA_SUCCESS, run(y_, reinterpret_cast<CUdeviceptr>(pinned))) << report();
  EXPECT_CU(CUDA_SUCCESS, run(y_, managed)) << report();
  cuMemFreeHost(pinned);
  cuMemFree(managed);
}

}  // namespace
}  // namespace gpu_emulator::testing_support
