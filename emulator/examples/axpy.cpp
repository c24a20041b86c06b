// Runs axpy.ptx on the emulated GPU: axpy libgpu_emulator.so axpy.ptx
//
// Only cuda.h's types are used: the entry points come from the library named on the command line,
// which may as well be libcuda.so.1.

#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

void* library = nullptr;

// Calls the entry point `name`, of the type that cuda.h declares; ends the program if it fails.
template <typename Function, typename... Arguments>
void call(const char* name, Arguments... arguments) {
  auto* function = reinterpret_cast<Function*>(dlsym(library, name));
  const CUresult result = function ? function(arguments...) : CUDA_ERROR_NOT_FOUND;
  if (result == CUDA_SUCCESS) return;
  std::fprintf(stderr, "%s failed: CUresult %d\n", name, result);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !(library = dlopen(argv[1], RTLD_NOW))) {
    std::fprintf(stderr, "usage: axpy LIBRARY PTX\n");
    return 2;
  }
  std::ifstream file(argv[2]);
  const std::string ptx((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());

  CUcontext context;
  CUmodule module;
  CUfunction kernel;
  call<decltype(cuInit)>("cuInit", 0u);
  call<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain", &context, 0);
  call<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent", context);
  call<decltype(cuModuleLoadData)>("cuModuleLoadData", &module, ptx.c_str());
  call<decltype(cuModuleGetFunction)>("cuModuleGetFunction", &kernel, module, "axpy");

  int n = 1000;
  float a = 0.5f;
  std::vector<float> y(1000, 1.0f), x(1000, 4.0f);
  CUdeviceptr device_y, device_x;
  call<decltype(cuMemAlloc)>("cuMemAlloc_v2", &device_y, size_t{4000});
  call<decltype(cuMemAlloc)>("cuMemAlloc_v2", &device_x, size_t{4000});
  call<decltype(cuMemcpyHtoD)>("cuMemcpyHtoD_v2", device_y, y.data(), size_t{4000});
  call<decltype(cuMemcpyHtoD)>("cuMemcpyHtoD_v2", device_x, x.data(), size_t{4000});
  void* parameters[] = {&device_y, &device_x, &a, &n};
  call<decltype(cuLaunchKernel)>("cuLaunchKernel", kernel, 8u, 1u, 1u, 128u, 1u, 1u, 0u, nullptr,
                                 parameters, nullptr);
  call<decltype(cuMemcpyDtoH)>("cuMemcpyDtoH_v2", y.data(), device_y, size_t{4000});
  std::printf("y[999] = %g\n", y[999]);
  return y[999] == 3.0f ? 0 : 1;
}
