#include <dlfcn.h>

#include <set>
#include <string>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

std::set<std::string> exported_symbols() {
  std::set<std::string> names;
  FILE* pipe = popen(GPU_EMULATOR_NM " -D --defined-only " GPU_EMULATOR_LIBRARY, "r");
  char address[64], kind[8], name[256];
  while (pipe && std::fscanf(pipe, "%63s %7s %255s", address, kind, name) == 3) names.insert(name);
  if (pipe) pclose(pipe);
  return names;
}

std::string without_version(const std::string& name) {
  const size_t at = name.rfind("_v");
  return at != std::string::npos && at + 3 == name.size() ? name.substr(0, at) : name;
}

class SharedLibrary : public ::testing::Test {
 protected:
  void SetUp() override {
    library_ = dlopen(GPU_EMULATOR_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library_, nullptr) << dlerror();
  }
  template <typename Function>
  Function get(const char* name) {
    auto* function = reinterpret_cast<Function>(dlsym(library_, name));
    EXPECT_NE(function, nullptr) << name;
    return function;
  }
  void* library_ = nullptr;
};

TEST_F(SharedLibrary, ExportsTheDriverApiAndNothingElse) {
  const std::set<std::string> names = exported_symbols();
  EXPECT_GT(names.size(), 100u);
  for (const std::string& name : names) {
    EXPECT_TRUE(name.starts_with("cu") || name.starts_with("gpuEmulator")) << name;
  }
  for (const char* name : {"cuInit", "cuMemAlloc_v2", "cuLaunchKernelEx", "cuGetProcAddress_v2",
                           "cuCtxCreate_v2", "cuCtxCreate_v4", "cuTensorMapEncodeTiled"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST_F(SharedLibrary, EveryExportIsKnownByName) {
  auto* get_address = get<decltype(&cuGetProcAddress_v2)>("cuGetProcAddress_v2");
  for (const std::string& name : exported_symbols()) {
    if (!name.starts_with("cu")) continue;
    void* function = nullptr;
    CUdriverProcAddressQueryResult status;
    EXPECT_CU(CUDA_SUCCESS,
              get_address(without_version(name).c_str(), &function, CUDA_VERSION, 0, &status));
    EXPECT_NE(function, nullptr) << name;
  }
}

TEST_F(SharedLibrary, IsAnotherDriverThanTheOneLinkedHere) {
  auto* init = get<decltype(&cuInit)>("cuInit");
  auto* set_option = get<decltype(&gpuEmulatorSetOption)>("gpuEmulatorSetOption");
  auto* report = get<decltype(&gpuEmulatorLastReport)>("gpuEmulatorLastReport");
  EXPECT_EQ(init(0), CUDA_SUCCESS);
  EXPECT_EQ(set_option(0, "nonsense", ""), CUDA_ERROR_INVALID_VALUE);
  EXPECT_GT(report(0, nullptr, 0), 0u);
}

}  // namespace
}  // namespace gpu_emulator::testing_support
