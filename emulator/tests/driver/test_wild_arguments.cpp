// Handles and pointers that no driver gave: an error each time, never a signal.

#include <random>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

class WildArguments : public DriverTest {
 protected:
  // Null, small, misaligned, beyond the address space, an address of the program's code, a stale
  // handle, or 64 random bits.
  uint64_t wild() {
    switch (random_() % 7) {
      case 0:
        return 0;
      case 1:
        return random_() % 4096;
      case 2:
        return ~(random_() % 4096);
      case 3:
        return random_() | uint64_t{1} << 63;
      case 4:
        return reinterpret_cast<uint64_t>(&cuInit);
      case 5:
        return (random_() % 10) << 40 | (random_() % 8) << 4 | 1;
      default:
        return random_() % 65536 * 8 + 8;
    }
  }
  template <typename T>
  T as() {
    return reinterpret_cast<T>(wild());
  }
  CUdeviceptr address() { return wild(); }
  int number() { return static_cast<int>(random_()); }

  // One entry point; which must fail, because it cannot mean anything.
  CUresult call(unsigned which) {
    switch (which) {
      case 0:
        return cuMemFree(address() | 1);
      case 1:
        return cuMemcpyDtoH(as<void*>(), address(), 1 + random_() % 100);
      case 2:
        return cuMemcpyHtoD(address(), as<void*>(), 1 + random_() % 100);
      case 3:
        return cuMemsetD32(address(), 0, 1 + random_());
      case 4:
        return cuModuleGetFunction(as<CUfunction*>(), as<CUmodule>(), as<const char*>());
      case 5:
        return cuModuleUnload(as<CUmodule>());
      case 6:
        return cuLaunchKernel(as<CUfunction>(), 1, 1, 1, 1, 1, 1, 0, as<CUstream>(), as<void**>(),
                              as<void**>());
      case 7:
        return cuLaunchKernelEx(as<CUlaunchConfig*>(), as<CUfunction>(), nullptr, nullptr);
      case 8:
        return cuEventRecord(as<CUevent>(), as<CUstream>());
      case 9:
        return cuStreamDestroy(as<CUstream>());
      case 10:
        return cuGraphLaunch(as<CUgraphExec>(), as<CUstream>());
      case 11:
        return cuFuncSetAttribute(as<CUfunction>(), CU_FUNC_ATTRIBUTE_CACHE_MODE_CA, number());
      case 12:
        return cuPointerGetAttribute(as<void*>(), static_cast<CUpointer_attribute>(number()),
                                     address());
      case 13:
        return cuLibraryGetKernel(as<CUkernel*>(), as<CUlibrary>(), as<const char*>());
      case 14:
        return cuKernelGetFunction(as<CUfunction*>(), as<CUkernel>());
      case 15:
        return cuMemHostRegister(as<void*>(), random_() << 40, static_cast<unsigned>(number()));
      case 16:
        return cuMemcpy2D(as<CUDA_MEMCPY2D*>());
      case 17:
        return cuModuleLoadData(as<CUmodule*>(), as<void*>());
      default:
        return cuDeviceGetName(as<char*>(), number(), 2 + std::abs(number() / 2));
    }
  }

  std::mt19937_64 random_{5};
};

TEST_F(WildArguments, AreErrors) {
  for (int round = 0; round < 4000; ++round) {
    const unsigned which = static_cast<unsigned>(random_() % 19);
    EXPECT_NE(name_of(call(which)), "CUDA_SUCCESS") << which;
    EXPECT_NE(report(), "") << which;
  }
}

}  // namespace
}  // namespace gpu_emulator::testing_support
