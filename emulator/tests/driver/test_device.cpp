#include <string>
#include <vector>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

using DriverDevice = DriverTest;

int attribute(CUdevice_attribute which, int device) {
  int value = -1;
  EXPECT_CU(CUDA_SUCCESS, cuDeviceGetAttribute(&value, which, device));
  return value;
}

TEST(DriverInitDeathTest, NothingWorksBeforeInit) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a new process
  EXPECT_EXIT(
      {
        int count = 0;
        CUcontext context = nullptr;
        const bool right = cuDeviceGetCount(&count) == CUDA_ERROR_NOT_INITIALIZED &&
                           cuDevicePrimaryCtxRetain(&context, 0) == CUDA_ERROR_NOT_INITIALIZED &&
                           cuDriverGetVersion(&count) == CUDA_SUCCESS;
        std::exit(right ? 0 : 1);
      },
      testing::ExitedWithCode(0), "");
}

TEST_F(DriverDevice, Versions) {
  int version = 0;
  EXPECT_CU(CUDA_SUCCESS, cuDriverGetVersion(&version));
  EXPECT_EQ(version, CUDA_VERSION);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuInit(1));
}

TEST_F(DriverDevice, A100AndH100) {
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kA100), 8);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kH100), 9);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, kA100), 108);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, kH100), 132);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, kA100), 163 * 1024);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, kH100), 227 * 1024);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, kA100), 0);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, kH100), 1);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE, kH100), 32);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, kH100), 0);
}

// Compute capabilities 8.6, 8.9 and 12.0 have less shared memory.
TEST_F(DriverDevice, SmallerDevices) {
  int count = 0;
  EXPECT_CU(CUDA_SUCCESS, cuDeviceGetCount(&count));
  ASSERT_EQ(count, 5);
  std::vector<int> capabilities;
  for (CUdevice device = 2; device < count; ++device) {
    capabilities.push_back(10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) +
                           attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device));
    EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device), 99 * 1024);
    EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, device), 1536);
    EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, device), 0);
    EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE, device), 32);
  }
  EXPECT_EQ(capabilities, (std::vector<int>{86, 89, 120}));
}

TEST_F(DriverDevice, NamesAreCutToTheBuffer) {
  char name[64];
  ASSERT_CU(CUDA_SUCCESS, cuDeviceGetName(name, sizeof(name), kH100));
  EXPECT_NE(std::string(name).find("H100"), std::string::npos);
  char text[5] = "????";
  ASSERT_CU(CUDA_SUCCESS, cuDeviceGetName(text, 4, kH100));
  EXPECT_EQ(std::string(text), std::string(name).substr(0, 3));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuDeviceGetName(name, -1, kH100));
}

TEST_F(DriverDevice, BadDevicesAndAttributes) {
  int value = 0;
  CUdevice device = 0;
  EXPECT_CU(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&device, 5));
  EXPECT_CU(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&device, -1));
  EXPECT_NE(report(), "");
  EXPECT_CU(CUDA_ERROR_INVALID_DEVICE,
            cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_WARP_SIZE, 7));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuDeviceGetAttribute(&value, static_cast<CUdevice_attribute>(100000), 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuDeviceGetAttribute(nullptr, CU_DEVICE_ATTRIBUTE_WARP_SIZE, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuDeviceGetAttribute(reinterpret_cast<int*>(16), CU_DEVICE_ATTRIBUTE_WARP_SIZE, 0));
}

TEST(DriverErrors, HaveNamesAndTexts) {
  const char* text = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuGetErrorName(CUDA_ERROR_ILLEGAL_ADDRESS, &text));
  EXPECT_STREQ(text, "CUDA_ERROR_ILLEGAL_ADDRESS");
  EXPECT_CU(CUDA_SUCCESS, cuGetErrorString(CUDA_SUCCESS, &text));
  EXPECT_STREQ(text, "no error");
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuGetErrorName(static_cast<CUresult>(12345), &text));
  EXPECT_EQ(text, nullptr);
}

TEST_F(DriverDevice, ContextStack) {
  CUcontext current = nullptr, other = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuDevicePrimaryCtxRetain(&other, kH100));
  EXPECT_NE(other, context_);
  EXPECT_CU(CUDA_SUCCESS, cuCtxPushCurrent(other));
  CUdevice device = -1;
  EXPECT_CU(CUDA_SUCCESS, cuCtxGetDevice(&device));
  EXPECT_EQ(device, kH100);
  EXPECT_CU(CUDA_SUCCESS, cuCtxPopCurrent(&current));
  EXPECT_EQ(current, other);
  EXPECT_CU(CUDA_SUCCESS, cuCtxGetCurrent(&current));
  EXPECT_EQ(current, context_);
  EXPECT_CU(CUDA_SUCCESS, cuDevicePrimaryCtxRelease(kH100));
  EXPECT_CU(CUDA_ERROR_INVALID_CONTEXT, cuDevicePrimaryCtxRelease(kH100));

  EXPECT_CU(CUDA_SUCCESS, cuCtxSetCurrent(other));
  EXPECT_CU(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuCtxGetDevice(&device)) << "no longer retained";
  EXPECT_CU(CUDA_SUCCESS, cuCtxSetCurrent(nullptr));
  EXPECT_CU(CUDA_ERROR_INVALID_CONTEXT, cuCtxGetDevice(&device));
  EXPECT_CU(CUDA_ERROR_INVALID_CONTEXT, cuCtxPopCurrent(&current));
  EXPECT_CU(CUDA_ERROR_INVALID_CONTEXT, cuCtxSetCurrent(reinterpret_cast<CUcontext>(0x1234)));
  EXPECT_CU(CUDA_SUCCESS, cuCtxSetCurrent(context_));
}

TEST_F(DriverDevice, DestroyingAContextFreesWhatItHolds) {
  CUcontext own = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuCtxCreate(&own, nullptr, 0, kA100));
  const CUdeviceptr memory = allocate(64);
  CUstream stream = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuStreamCreate(&stream, 0));
  ASSERT_CU(CUDA_SUCCESS, cuCtxDestroy(own));
  EXPECT_CU(CUDA_ERROR_INVALID_CONTEXT, cuCtxDestroy(own));
  CUcontext current = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuCtxGetCurrent(&current));
  EXPECT_EQ(current, context_);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemsetD8(memory, 0, 1));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(stream));
}

TEST_F(DriverDevice, EntryPointsByName) {
  void* function = nullptr;
  CUdriverProcAddressQueryResult status;
  EXPECT_CU(CUDA_SUCCESS, cuGetProcAddress("cuMemAlloc", &function, 13000, 0, &status));
  EXPECT_EQ(function, reinterpret_cast<void*>(&cuMemAlloc));
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SUCCESS);
  EXPECT_CU(CUDA_SUCCESS, cuGetProcAddress("cuTexRefCreate", &function, 13000, 0, &status));
  EXPECT_EQ(function, nullptr);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_CU(CUDA_SUCCESS, cuGetProcAddress("cuGetProcAddress", &function, 10000, 0, &status));
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  void *old_create = nullptr, *new_create = nullptr;
  cuGetProcAddress("cuCtxCreate", &old_create, 11000, 0, nullptr);
  cuGetProcAddress("cuCtxCreate", &new_create, 13000, 0, nullptr);
  EXPECT_NE(old_create, nullptr);
  EXPECT_NE(old_create, new_create);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuGetProcAddress(nullptr, &function, 13000, 0, &status));
  EXPECT_CU(CUDA_ERROR_NOT_FOUND, cuGetProcAddress("cuNothing", &function, 13000, 0, nullptr));
}

TEST_F(DriverDevice, OptionsAreChecked) {
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "mode", "late"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "mode", "eager"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "mode", "later"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_NE(report().find("'later'"), std::string::npos);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "seed", "-1"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "seed", "12x"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "count", "2"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "delete_line", "100000"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "delete_line", "2147483648"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "delete_line", "0"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "sms", "0"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "sms", "3"), CUDA_SUCCESS);
  EXPECT_EQ(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, kA100), 3);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "sms", "108"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", "all,-proxy_fence-init_fence"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", "memory+race"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", "none"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", "some"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kH100, "checks", "all-fence"), CUDA_ERROR_INVALID_VALUE);
  // Of the device that was asked, whatever the thread's context is.
  EXPECT_NE(last_report(kH100).find("no kind 'fence'"), std::string::npos) << last_report(kH100);
  EXPECT_NE(last_report(kH100).find("init_fence"), std::string::npos);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "checks", "all"), CUDA_SUCCESS);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, "colour", "1"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(kA100, nullptr, "1"), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(gpuEmulatorSetOption(9, "mode", "late"), CUDA_ERROR_INVALID_DEVICE);
  EXPECT_EQ(gpuEmulatorLastReport(9, nullptr, 0), 0u);
}

}  // namespace
}  // namespace gpu_emulator::testing_support
