#include <cstring>
#include <vector>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

using DriverMemory = DriverTest;

TEST_F(DriverMemory, NewMemoryIsAlignedAndPoisoned) {
  const CUdeviceptr memory = allocate(100);
  EXPECT_EQ(memory % 256, 0u);
  float value = 0;
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(&value, memory, 4));
  EXPECT_NE(value, value) << "NaN";
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemFree(memory)) << "twice";
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(0));
}

TEST_F(DriverMemory, CopiesStayInTheirAllocation) {
  const CUdeviceptr memory = allocate(64);
  std::vector<char> host(65, 7);
  EXPECT_CU(CUDA_SUCCESS, cuMemcpyHtoD(memory, host.data(), 64));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD(memory, host.data(), 65));
  EXPECT_NE(report().find("reaches beyond"), std::string::npos) << report();
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD(memory + 63, host.data(), 2));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH(host.data(), memory - 1, 1));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoD(memory, memory + 1, 64));
  EXPECT_CU(CUDA_SUCCESS, cuMemcpyHtoD(memory, nullptr, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH(host.data(), memory, SIZE_MAX));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, WildHostPointersAreErrors) {
  const CUdeviceptr memory = allocate(64);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD(memory, nullptr, 64));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD(memory, reinterpret_cast<void*>(16), 64));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH(reinterpret_cast<void*>(16), memory, 64));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpy(16, memory, 64));
  static const char read_only[64] = "constant";
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH(const_cast<char*>(read_only), memory, 64));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, Memset) {
  const CUdeviceptr memory = allocate(64);
  uint32_t values[16];
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD32(memory, 0x12345678, 16));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD16(memory + 4, 0xabcd, 2));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD8Async(memory + 8, 9, 3, nullptr));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD2D32(memory + 16, 16, 5, 2, 3));
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(values, memory, 64));
  const uint32_t expected[16] = {
      0x12345678, 0xabcdabcd, 0x12090909, 0x12345678, 5, 5, 0x12345678, 0x12345678,
      5,          5,          0x12345678, 0x12345678, 5, 5, 0x12345678, 0x12345678};
  for (int i = 0; i < 16; ++i) EXPECT_EQ(values[i], expected[i]) << i;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemsetD32(memory + 2, 0, 1));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemsetD32(memory, 0, 17));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemsetD32(memory, 0, SIZE_MAX / 2));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemsetD2D8(memory, 8, 0, 9, 2)) << "row beyond the pitch";
  EXPECT_CU(CUDA_SUCCESS, cuMemsetD2D8(memory, 8, 0, 0, SIZE_MAX));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, Copy2d) {
  const CUdeviceptr memory = allocate(64);
  const uint8_t rows[2][5] = {{1, 2, 3, 4, 5}, {6, 7, 8, 9, 10}};
  CUDA_MEMCPY2D copy = {};
  copy.srcMemoryType = CU_MEMORYTYPE_HOST;
  copy.srcHost = rows;
  copy.srcPitch = 5;
  copy.srcXInBytes = 1;
  copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  copy.dstDevice = memory;
  copy.dstPitch = 16;
  copy.dstY = 1;
  copy.WidthInBytes = 3;
  copy.Height = 2;
  ASSERT_CU(CUDA_SUCCESS, cuMemcpy2D(&copy));
  uint8_t result[64];
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(result, memory, 64));
  EXPECT_EQ(result[16], 2);
  EXPECT_EQ(result[18], 4);
  EXPECT_EQ(result[19], 0xff);
  EXPECT_EQ(result[34], 9);
  copy.Height = 4;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpy2D(&copy));
  copy.Height = SIZE_MAX;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpy2D(&copy));
  copy.srcMemoryType = CU_MEMORYTYPE_ARRAY;
  EXPECT_CU(CUDA_ERROR_NOT_SUPPORTED, cuMemcpy2D(&copy));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpy2D(nullptr));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, SizesBeyondTheDevice) {
  CUdeviceptr memory = 0;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemAlloc(&memory, 0));
  EXPECT_CU(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc(&memory, size_t{1} << 50));
  EXPECT_CU(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc(&memory, static_cast<size_t>(-5)));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemAlloc(nullptr, 5));
  size_t free = 0, total = 0, less = 0;
  ASSERT_CU(CUDA_SUCCESS, cuMemGetInfo(&free, &total));
  EXPECT_LE(free, total);
  memory = allocate(4096);
  ASSERT_CU(CUDA_SUCCESS, cuMemGetInfo(&less, &total));
  EXPECT_EQ(less, free - 4096);
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, RegisteredHostMemory) {
  std::vector<float> host(100);
  const auto address = reinterpret_cast<CUdeviceptr>(host.data());
  ASSERT_CU(CUDA_SUCCESS, cuMemHostRegister(host.data(), 400, 0));
  EXPECT_CU(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister(host.data() + 50, 4, 0));
  CUdeviceptr device_pointer = 0;
  EXPECT_CU(CUDA_SUCCESS, cuMemHostGetDevicePointer(&device_pointer, host.data() + 3, 0));
  EXPECT_EQ(device_pointer, address + 12);
  EXPECT_CU(CUDA_SUCCESS, cuMemsetD32(address, 0x3f800000, 100));
  EXPECT_EQ(host[99], 1.0f);
  EXPECT_CU(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(host.data() + 1));
  EXPECT_CU(CUDA_SUCCESS, cuMemHostUnregister(host.data()));
  EXPECT_CU(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(host.data()));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister(nullptr, 4, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister(host.data(), 0, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister(host.data(), SIZE_MAX, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister(reinterpret_cast<void*>(16), 4, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister(host.data(), 400, 0x8000));
}

TEST_F(DriverMemory, PointerAttributes) {
  const CUdeviceptr memory = allocate(64);
  unsigned type = 0;
  EXPECT_CU(CUDA_SUCCESS,
            cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, memory + 5));
  EXPECT_EQ(type, unsigned{CU_MEMORYTYPE_DEVICE});
  CUdeviceptr base = 0;
  size_t bytes = 0;
  EXPECT_CU(CUDA_SUCCESS, cuMemGetAddressRange(&base, &bytes, memory + 63));
  EXPECT_EQ(base, memory);
  EXPECT_EQ(bytes, 64u);
  EXPECT_CU(CUDA_ERROR_NOT_FOUND, cuMemGetAddressRange(&base, &bytes, memory + 64));
  int ordinal = 0;
  CUcontext context = nullptr;
  CUpointer_attribute which[] = {CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_CONTEXT};
  void* out[] = {&ordinal, &context};
  EXPECT_CU(CUDA_SUCCESS, cuPointerGetAttributes(2, which, out, memory));
  EXPECT_EQ(ordinal, kA100);
  EXPECT_EQ(context, context_);
  EXPECT_CU(CUDA_SUCCESS, cuPointerGetAttributes(2, which, out, 4096));
  EXPECT_EQ(context, nullptr);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 4096));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverMemory, PinnedAndManagedMemory) {
  void* pinned = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuMemHostAlloc(&pinned, 100, CU_MEMHOSTALLOC_PORTABLE));
  std::memset(pinned, 1, 100);
  CUdeviceptr managed = 0;
  ASSERT_CU(CUDA_SUCCESS, cuMemAllocManaged(&managed, 100, CU_MEM_ATTACH_GLOBAL));
  EXPECT_CU(CUDA_SUCCESS, cuMemcpy(managed, reinterpret_cast<CUdeviceptr>(pinned), 100));
  EXPECT_EQ(reinterpret_cast<char*>(managed)[99], 1);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemFree(reinterpret_cast<CUdeviceptr>(pinned)));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemFreeHost(reinterpret_cast<void*>(managed)));
  EXPECT_CU(CUDA_SUCCESS, cuMemFreeHost(pinned));
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(managed));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemAllocManaged(&managed, 100, 77));
}

}  // namespace
}  // namespace gpu_emulator::testing_support
