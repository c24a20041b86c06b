#include <sys/mman.h>

#include <cstring>
#include <string>

#include "driver_test.h"
#include "support/fatbin_builder.h"

namespace gpu_emulator::testing_support {
namespace {

using DriverModule = DriverTest;

CUresult load_result(const void* image) {
  CUmodule module = nullptr;
  const CUresult result = cuModuleLoadData(&module, image);
  if (result == CUDA_SUCCESS) cuModuleUnload(module);
  return result;
}

TEST_F(DriverModule, PtxText) {
  CUmodule module = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuModuleLoadData(&module, kAxpy)) << report();
  CUfunction function = nullptr, again = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuModuleGetFunction(&function, module, "axpy"));
  EXPECT_CU(CUDA_SUCCESS, cuModuleGetFunction(&again, module, "axpy"));
  EXPECT_EQ(function, again);
  const char* name = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuFuncGetName(&name, function));
  EXPECT_STREQ(name, "axpy");
  size_t offset = 0, bytes = 0;
  EXPECT_CU(CUDA_SUCCESS, cuFuncGetParamInfo(function, 2, &offset, &bytes));
  EXPECT_EQ(offset, 16u);
  EXPECT_EQ(bytes, 4u);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuFuncGetParamInfo(function, 4, &offset, &bytes));
  EXPECT_CU(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&function, module, "axpyy"));
  EXPECT_NE(report().find("It has: axpy, bounded"), std::string::npos) << report();
  EXPECT_CU(CUDA_SUCCESS, cuModuleUnload(module));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuModuleUnload(module));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuModuleGetFunction(&again, module, "axpy"));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuFuncGetName(&name, function));
}

TEST_F(DriverModule, Variables) {
  CUmodule module = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuModuleLoadData(&module, kAxpy));
  CUdeviceptr address = 0;
  size_t bytes = 0;
  ASSERT_CU(CUDA_SUCCESS, cuModuleGetGlobal(&address, &bytes, module, "launches"));
  EXPECT_EQ(bytes, 4u);
  uint32_t value = 0;
  ASSERT_CU(CUDA_SUCCESS, cuMemcpyDtoH(&value, address, 4));
  EXPECT_EQ(value, 5u);
  EXPECT_CU(CUDA_ERROR_NOT_FOUND, cuModuleGetGlobal(&address, &bytes, module, "none"));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemFree(address)) << "the module's, not the caller's";
  EXPECT_CU(CUDA_SUCCESS, cuModuleUnload(module));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH(&value, address, 4));
}

TEST_F(DriverModule, FatbinsAndTheirWrapper) {
  FatbinBuilder builder;
  builder.add_machine_code(80);
  builder.add_lz4_ptx(80, kAxpy);
  EXPECT_CU(CUDA_SUCCESS, load_result(builder.bytes().data())) << report();
  struct {
    uint32_t magic = 0x466243b1, version = 1;
    const void* data;
    const void* name = nullptr;
  } wrapper;
  wrapper.data = builder.bytes().data();
  CUmodule module = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuModuleLoadFatBinary(&module, &wrapper)) << report();
  EXPECT_CU(CUDA_SUCCESS, cuModuleUnload(module));
  wrapper.data = reinterpret_cast<void*>(16);
  EXPECT_CU(CUDA_ERROR_INVALID_IMAGE, load_result(&wrapper));
}

TEST_F(DriverModule, BadImages) {
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, load_result(nullptr));
  EXPECT_CU(CUDA_ERROR_INVALID_IMAGE, load_result(reinterpret_cast<void*>(64)));
  EXPECT_CU(CUDA_ERROR_INVALID_PTX, load_result(""));
  EXPECT_CU(CUDA_ERROR_INVALID_PTX, load_result(".version 9.0\n.target sm_80\n.entry k( {}"));
  EXPECT_NE(report().find("line 3"), std::string::npos) << report();
  EXPECT_CU(CUDA_ERROR_NO_BINARY_FOR_GPU, load_result(".version 9.0\n.target sm_90a\n"));
  EXPECT_NE(report().find("sm_90a"), std::string::npos) << report();
  EXPECT_CU(CUDA_ERROR_NO_BINARY_FOR_GPU, load_result("\x7f"
                                                      "ELF and more"));
  FatbinBuilder hopper;
  hopper.add_ptx(90, ".version 9.0\n.target sm_90a\n");
  EXPECT_CU(CUDA_ERROR_NO_BINARY_FOR_GPU, load_result(hopper.bytes().data()));
  std::string big =
      ".version 9.0\n.target sm_80\n.entry k() { .shared .b8 s[50000]; mov.b32 s, 0; }";
  EXPECT_NE(load_result(big.c_str()), CUDA_SUCCESS);
}

// A fatbin whose end, as its header says it, is not mapped.
TEST_F(DriverModule, TruncatedFatbinAtTheEndOfAPage) {
  FatbinBuilder builder;
  builder.add_ptx(80, std::string(kAxpy) + std::string(4096, ' '));
  const size_t page = 4096;
  auto* memory = static_cast<char*>(
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + page, page, PROT_NONE), 0);
  char* image = memory + page - 1024;
  std::memcpy(image, builder.bytes().data(), 1024);
  EXPECT_CU(CUDA_ERROR_INVALID_IMAGE, load_result(image));
  std::memset(memory, 'x', page);  // text without a terminating zero
  EXPECT_CU(CUDA_ERROR_INVALID_IMAGE, load_result(memory));
  munmap(memory, 2 * page);
}

TEST_F(DriverModule, JitErrorLog) {
  CUmodule module = nullptr;
  char log[64] = "";
  CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
  void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
  EXPECT_CU(CUDA_ERROR_INVALID_PTX, cuModuleLoadDataEx(&module, "nonsense", 2, options, values));
  EXPECT_EQ(std::string(log).substr(0, 22), "The PTX does not parse");
  EXPECT_LT(std::strlen(log), sizeof(log));
}

TEST_F(DriverModule, LibrariesServeEveryDevice) {
  CUlibrary library = nullptr;
  CUkernel kernel = nullptr;
  ASSERT_CU(CUDA_SUCCESS,
            cuLibraryLoadData(&library, kAxpy, nullptr, nullptr, 0, nullptr, nullptr, 0));
  ASSERT_CU(CUDA_SUCCESS, cuLibraryGetKernel(&kernel, library, "axpy"));
  EXPECT_CU(CUDA_ERROR_NOT_FOUND, cuLibraryGetKernel(&kernel, library, "none"));
  CUfunction here = nullptr, there = nullptr;
  EXPECT_CU(CUDA_SUCCESS, cuKernelGetFunction(&here, kernel));
  CUcontext other = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuDevicePrimaryCtxRetain(&other, kH100));
  ASSERT_CU(CUDA_SUCCESS, cuCtxPushCurrent(other));
  EXPECT_CU(CUDA_SUCCESS, cuKernelGetFunction(&there, kernel));
  EXPECT_NE(here, there);
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE,
            cuLaunchKernel(here, 1, 1, 1, 1, 1, 1, 0, nullptr, nullptr, nullptr));
  ASSERT_CU(CUDA_SUCCESS, cuCtxPopCurrent(&other));
  EXPECT_CU(CUDA_SUCCESS, cuLibraryUnload(library));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuKernelGetFunction(&here, kernel));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuLibraryUnload(library));
  EXPECT_CU(CUDA_SUCCESS, cuDevicePrimaryCtxRelease(kH100));
}

TEST_F(DriverModule, FunctionAttributes) {
  const CUfunction bounded = load(kAxpy, "bounded");
  const auto get = [&](CUfunction_attribute attribute) {
    int value = -99;
    EXPECT_CU(CUDA_SUCCESS, cuFuncGetAttribute(&value, attribute, bounded));
    return value;
  };
  EXPECT_EQ(get(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 64);
  EXPECT_EQ(get(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES), 1024);
  EXPECT_EQ(get(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES), 47 * 1024);
  EXPECT_EQ(get(CU_FUNC_ATTRIBUTE_PTX_VERSION), 80);
  const auto set = [&](CUfunction_attribute attribute, int value) {
    return cuFuncSetAttribute(bounded, attribute, value);
  };
  const auto kShared = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  EXPECT_CU(CUDA_SUCCESS, set(kShared, 162 * 1024));
  EXPECT_EQ(get(kShared), 162 * 1024);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, set(kShared, 162 * 1024 + 1));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, set(kShared, -1));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, set(CU_FUNC_ATTRIBUTE_NUM_REGS, 1));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, set(static_cast<CUfunction_attribute>(99), 1));
  EXPECT_CU(CUDA_SUCCESS, set(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100));
}

}  // namespace
}  // namespace gpu_emulator::testing_support
