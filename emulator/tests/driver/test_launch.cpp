#include <atomic>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

class DriverLaunch : public DriverTest {
 protected:
  void SetUp() override {
    DriverTest::SetUp();
    axpy_ = load(kAxpy, "axpy");
    y_ = allocate(kCount * 4);
    x_ = allocate(kCount * 4);
    std::vector<float> values(kCount);
    for (int i = 0; i < kCount; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i);
    ASSERT_CU(CUDA_SUCCESS, cuMemcpyHtoD(x_, values.data(), kCount * 4));
    ASSERT_CU(CUDA_SUCCESS, cuMemsetD32(y_, 0x3f800000, kCount));
  }

  CUresult run(CUstream stream = nullptr) {
    void* params[] = {&y_, &x_, &a_, &n_};
    return cuLaunchKernel(axpy_, (kCount + 63) / 64, 1, 1, 64, 1, 1, 0, stream, params, nullptr);
  }
  void expect_result(int launches) {
    std::vector<float> values(kCount);
    ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(values.data(), y_, kCount * 4));
    for (int i = 0; i < kCount; ++i) {
      ASSERT_EQ(values[static_cast<size_t>(i)], 1.0f + static_cast<float>(launches * i) * a_) << i;
    }
  }

  static constexpr int kCount = 1000;
  CUfunction axpy_ = nullptr;
  CUdeviceptr y_ = 0, x_ = 0;
  float a_ = 0.5f;
  uint32_t n_ = kCount;
};

TEST_F(DriverLaunch, ComputesWithParameterPointers) {
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  EXPECT_EQ(report(), "");
  expect_result(1);
}

TEST_F(DriverLaunch, LeavesOutALineOfTheNamedKernelAlone) {
  const int store = 18;  // its line in kAxpy
  const auto set = [](const char* name, const std::string& value) {
    EXPECT_CU(CUDA_SUCCESS,
              static_cast<CUresult>(gpuEmulatorSetOption(kA100, name, value.c_str())));
  };
  set("delete_line", std::to_string(store));
  set("delete_in", "another");
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  expect_result(1);
  for (const char* name : {"axpy", ""}) {
    set("delete_in", name);
    ASSERT_CU(CUDA_SUCCESS, run()) << report();
    expect_result(1);
  }
  set("delete_line", "0");
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  expect_result(2);
}

TEST_F(DriverLaunch, PutsOtherTextInPlaceOfLines) {
  const int store = 18;  // its line in kAxpy
  const auto set = [](const std::string& lines) {
    return static_cast<CUresult>(gpuEmulatorSetOption(kA100, "replace_lines", lines.c_str()));
  };
  ASSERT_CU(CUDA_SUCCESS, set(std::to_string(store) + " // nothing"));
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, set("eighteen // nothing"));
  ASSERT_CU(CUDA_SUCCESS, set(std::to_string(store) + " trap;"));
  EXPECT_CU(CUDA_ERROR_LAUNCH_FAILED, run());
  ASSERT_CU(CUDA_SUCCESS, set(""));
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  expect_result(1);
}

TEST_F(DriverLaunch, ComputesWithAParameterBuffer) {
  struct {
    CUdeviceptr y, x;
    float a;
    uint32_t n;
  } block = {y_, x_, a_, n_};
  size_t bytes = sizeof(block);
  void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &block, CU_LAUNCH_PARAM_BUFFER_SIZE, &bytes,
                   CU_LAUNCH_PARAM_END};
  ASSERT_CU(CUDA_SUCCESS, cuLaunchKernel(axpy_, 16, 1, 1, 64, 1, 1, 0, nullptr, nullptr, extra));
  expect_result(1);
  bytes = 20;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuLaunchKernel(axpy_, 16, 1, 1, 64, 1, 1, 0, nullptr, nullptr, extra));
}

TEST_F(DriverLaunch, CapturedLaunchKeepsItsParameters) {
  CUstream stream = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuStreamCreate(&stream, 0));
  ASSERT_CU(CUDA_SUCCESS, cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
  ASSERT_CU(CUDA_SUCCESS, run(stream));
  n_ = 0;  // read at capture, not at launch
  CUgraph graph = nullptr;
  CUgraphExec exec = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuStreamEndCapture(stream, &graph));
  ASSERT_CU(CUDA_SUCCESS, cuGraphInstantiate(&exec, graph, 0));
  expect_result(0);
  for (int i = 1; i <= 2; ++i) {
    ASSERT_CU(CUDA_SUCCESS, cuGraphLaunch(exec, stream)) << report();
    expect_result(i);
  }
}

TEST_F(DriverLaunch, RegisteredHostMemoryIsSeenInPlace) {
  std::vector<float> host(kCount, 1.0f);
  ASSERT_CU(CUDA_SUCCESS, cuMemHostRegister(host.data(), kCount * 4, 0));
  y_ = reinterpret_cast<CUdeviceptr>(host.data());
  ASSERT_CU(CUDA_SUCCESS, run()) << report();
  EXPECT_EQ(host[10], 6.0f);
  ASSERT_CU(CUDA_SUCCESS, cuMemHostUnregister(host.data()));
  EXPECT_CU(CUDA_ERROR_ILLEGAL_ADDRESS, run());
}

TEST_F(DriverLaunch, KernelErrorsAreReportedAndLeaveTheContextUsable) {
  n_ = kCount + 1;  // one element past the end
  EXPECT_CU(CUDA_ERROR_ILLEGAL_ADDRESS, run());
  const std::string text = report();
  EXPECT_NE(text.find("axpy"), std::string::npos) << text;
  EXPECT_NE(text.find("ld.global.f32"), std::string::npos) << text;
  y_ = 16;
  EXPECT_CU(CUDA_ERROR_ILLEGAL_ADDRESS, run());
  EXPECT_CU(CUDA_SUCCESS, cuCtxSynchronize());
  n_ = 0;
  EXPECT_CU(CUDA_SUCCESS, run());
  EXPECT_EQ(report(), "");
}

#ifdef GPU_EMULATOR_AXPY_PTX
// The example, compiled with -lineinfo.
TEST_F(DriverLaunch, ErrorsNameTheSourceLine) {
  CUmodule module = nullptr;
  std::ifstream file(GPU_EMULATOR_AXPY_PTX);
  std::stringstream text;
  text << file.rdbuf();
  ASSERT_CU(CUDA_SUCCESS, cuModuleLoadData(&module, text.str().c_str())) << report();
  ASSERT_CU(CUDA_SUCCESS, cuModuleGetFunction(&axpy_, module, "axpy"));
  ++n_;
  EXPECT_CU(CUDA_ERROR_ILLEGAL_ADDRESS, run());
  EXPECT_NE(report().find("examples/axpy.cu:4)"), std::string::npos) << report();
}
#endif

TEST_F(DriverLaunch, CountersAreKeptByKernel) {
  gpuEmulatorResetCounters(kA100);
  ASSERT_CU(CUDA_SUCCESS, run());
  std::string json(gpuEmulatorCounters(kA100, nullptr, 0), '\0');
  gpuEmulatorCounters(kA100, json.data(), json.size() + 1);
  EXPECT_NE(json.find("axpy"), std::string::npos) << json;
  gpuEmulatorResetCounters(kA100);
  EXPECT_LT(gpuEmulatorCounters(kA100, nullptr, 0), json.size());
}

TEST_F(DriverLaunch, BadShapes) {
  void* params[] = {&y_, &x_, &a_, &n_};
  const auto shape = [&](unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned bz,
                         unsigned shared) {
    return cuLaunchKernel(axpy_, gx, gy, 1, bx, by, bz, shared, nullptr, params, nullptr);
  };
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(0, 1, 32, 1, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 65536, 32, 1, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(0x80000000u, 1, 32, 1, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 1, 0, 1, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 1, 1025, 1, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 1, 33, 32, 1, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 1, 1, 1, 65, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, shape(1, 1, 32, 1, 1, 48 * 1024 + 1));
  EXPECT_NE(report().find("MAX_DYNAMIC_SHARED"), std::string::npos) << report();
  ASSERT_CU(CUDA_SUCCESS,
            cuFuncSetAttribute(axpy_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100000));
  EXPECT_CU(CUDA_SUCCESS, shape(1, 1, 32, 1, 1, 48 * 1024 + 1)) << report();
}

TEST_F(DriverLaunch, LimitsOfTheKernel) {
  uint32_t unused = 0;
  void* params[] = {&unused};
  const CUfunction bounded = load(kAxpy, "bounded"), fixed = load(kAxpy, "fixed");
  EXPECT_CU(CUDA_SUCCESS, cuLaunchKernel(bounded, 1, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr))
      << report();
  EXPECT_CU(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            cuLaunchKernel(bounded, 1, 1, 1, 65, 1, 1, 0, nullptr, params, nullptr));
  EXPECT_CU(CUDA_SUCCESS, cuLaunchKernel(fixed, 1, 1, 1, 32, 1, 1, 0, nullptr, nullptr, nullptr));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuLaunchKernel(fixed, 1, 1, 1, 64, 1, 1, 0, nullptr, nullptr, nullptr));
}

TEST_F(DriverLaunch, BadParametersAndHandles) {
  void* params[] = {&y_, &x_, reinterpret_cast<void*>(16), &n_};
  const auto with = [&](CUfunction function, void** values) {
    return cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, nullptr, values, nullptr);
  };
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, with(axpy_, nullptr));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, with(axpy_, params));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, with(axpy_, reinterpret_cast<void**>(16)));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, with(nullptr, params));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, with(reinterpret_cast<CUfunction>(&params), params));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, run(reinterpret_cast<CUstream>(&params)));
}

TEST_F(DriverLaunch, ClustersNeedHopper) {
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attribute.value.clusterDim = {2, 1, 1};
  CUlaunchConfig config = {16, 1, 1, 64, 1, 1, 0, nullptr, &attribute, 1};
  void* params[] = {&y_, &x_, &a_, &n_};
  EXPECT_CU(CUDA_ERROR_INVALID_CLUSTER_SIZE, cuLaunchKernelEx(&config, axpy_, params, nullptr));
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  EXPECT_CU(CUDA_SUCCESS, cuLaunchKernelEx(&config, axpy_, params, nullptr)) << report();
  expect_result(1);
  attribute.id = static_cast<CUlaunchAttributeID>(63);
  EXPECT_CU(CUDA_ERROR_NOT_SUPPORTED, cuLaunchKernelEx(&config, axpy_, params, nullptr));
  config.attrs = reinterpret_cast<CUlaunchAttribute*>(16);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuLaunchKernelEx(&config, axpy_, params, nullptr));
}

TEST_F(DriverLaunch, ThreadsLaunchAndFreeAtTheSameTime) {
  std::atomic<int> failures = 0;
  const auto work = [&] {
    cuCtxSetCurrent(context_);
    for (int i = 0; i < 20; ++i) {
      CUdeviceptr y = 0;
      failures += cuMemAlloc(&y, kCount * 4) != CUDA_SUCCESS;
      failures += cuMemsetD32(y, 0, kCount) != CUDA_SUCCESS;
      void* params[] = {&y, &x_, &a_, &n_};
      failures +=
          cuLaunchKernel(axpy_, 16, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr) != CUDA_SUCCESS;
      float last = 0;
      failures += cuMemcpyDtoH(&last, y + (kCount - 1) * 4, 4) != CUDA_SUCCESS;
      failures += last != static_cast<float>(kCount - 1) * a_;
      failures += cuMemFree(y) != CUDA_SUCCESS;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0) << report();
}

class HopperLaunch : public HopperDriverTest {};

TEST_F(HopperLaunch, Clusters) {
  // Each CTA writes its rank in the cluster.
  const CUfunction ranks = load(R"(
.version 8.0
.target sm_90a
.address_size 64
.entry ranks(.param .u64 out) {
  .reg .b32 %r<3>; .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %cluster_ctarank;
  mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
  st.global.u32 [%rd1], %r2;
  ret;
}
)",
                                "ranks");
  CUdeviceptr out = allocate(64);
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attribute.value.clusterDim = {4, 1, 1};
  CUlaunchConfig config = {16, 1, 1, 32, 1, 1, 0, nullptr, &attribute, 1};
  void* params[] = {&out};
  ASSERT_CU(CUDA_SUCCESS, cuLaunchKernelEx(&config, ranks, params, nullptr)) << report();
  uint32_t values[16];
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(values, out, 64));
  for (uint32_t i = 0; i < 16; ++i) EXPECT_EQ(values[i], i % 4);

  const auto launch = [&](unsigned width, unsigned grid) {
    attribute.value.clusterDim.x = width;
    config.gridDimX = grid;
    return cuLaunchKernelEx(&config, ranks, params, nullptr);
  };
  EXPECT_CU(CUDA_ERROR_INVALID_CLUSTER_SIZE, launch(3, 16)) << "does not divide the grid";
  EXPECT_CU(CUDA_ERROR_INVALID_CLUSTER_SIZE, launch(0, 16));
  EXPECT_CU(CUDA_ERROR_INVALID_CLUSTER_SIZE, launch(16, 16)) << "not portable";
  ASSERT_CU(CUDA_SUCCESS,
            cuFuncSetAttribute(ranks, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1));
  EXPECT_CU(CUDA_SUCCESS, launch(16, 16)) << report();
}

TEST_F(DriverLaunch, KindsOfReportsAreSwitched) {
  CUfunction kernel = load(R"(
.version 8.0
.target sm_80
.address_size 64
.visible .entry same_place(.param .u64 y) {
  .reg .b32 %r; .reg .b64 %rd;
  ld.param.u64 %rd, [y];
  mov.u32 %r, %tid.x;
  st.global.u32 [%rd], %r;
  ret;
}
)",
                           "same_place");
  CUdeviceptr place = allocate(4);
  void* arguments[] = {&place};
  auto launch = [&] {
    return cuLaunchKernel(kernel, 1, 1, 1, 64, 1, 1, 0, nullptr, arguments, nullptr);
  };
  EXPECT_CU(CUDA_ERROR_LAUNCH_FAILED, launch());
  EXPECT_NE(report().find("kind: race (checks=all-race switches"), std::string::npos) << report();
  for (const char* checks : {"all-race", "all,-race", "memory"}) {
    EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", checks), CUDA_SUCCESS);
    EXPECT_CU(CUDA_SUCCESS, launch()) << report();
  }
  for (const char* checks : {"none+race", "all-in_flight", "all"}) {
    EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", checks), CUDA_SUCCESS);
    EXPECT_CU(CUDA_ERROR_LAUNCH_FAILED, launch()) << checks;
  }
}

}  // namespace
}  // namespace gpu_emulator::testing_support
