// A CUDA driver that does nothing but remember what it was asked to do: the tests of the driver's
// user need no GPU, and know every call.
#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "encoded_tiled.h"

namespace {

std::string calls;    // names, each followed by a blank
std::string failing;  // the call that fails with CUDA_ERROR_ILLEGAL_ADDRESS
CUstream last_stream;
unsigned last_shape[3];  // CTAs, threads, bytes of shared memory
int contexts = 0;        // pushed and not popped
EncodedTiled last_encoded;

CUresult note(const char* name) {
  calls += name;
  calls += ' ';
  return failing == name ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void fake_reset(const char* failing_call) {
  calls.clear();
  failing = failing_call;
}
const char* fake_calls() { return calls.c_str(); }
void* fake_last_stream() { return last_stream; }
const unsigned* fake_last_shape() { return last_shape; }
int fake_contexts() { return contexts; }
const EncodedTiled* fake_last_encoded() { return &last_encoded; }

CUresult cuInit(unsigned) { return note("cuInit"); }
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the fake driver";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 2;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return note("cuDeviceGet");
}
// Device 0 is of compute capability 8.0, device 1 of 7.5.
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR               ? 8 - device
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR             ? 5 * device
           : which == CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE                        ? 40 << 20
           : which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                 ? 108
           : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 164 << 10
           : which == CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK     ? 1 << 10
                                                                               : 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = reinterpret_cast<CUcontext>(1);
  return note("cuDevicePrimaryCtxRetain");
}
CUresult cuCtxPushCurrent(CUcontext) {
  ++contexts;
  return note("cuCtxPushCurrent");
}
CUresult cuCtxPopCurrent(CUcontext*) {
  --contexts;
  return note("cuCtxPopCurrent");
}
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = reinterpret_cast<CUmodule>(1);
  return note("cuModuleLoadData");
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  *function = reinterpret_cast<CUfunction>(1);
  return note("cuModuleGetFunction");
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  return note("cuFuncSetAttribute");
}
CUresult cuLaunchKernel(CUfunction, unsigned grid, unsigned, unsigned, unsigned threads, unsigned,
                        unsigned, unsigned shared_bytes, CUstream stream, void**, void**) {
  last_stream = stream;
  last_shape[0] = grid;
  last_shape[1] = threads;
  last_shape[2] = shared_bytes;
  return note("cuLaunchKernel");
}
CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return note("cuMemHostAlloc");
}

CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream) {
  return note("cuMemsetD32Async");
}
CUresult cuMemHostRegister(void*, size_t, unsigned) { return note("cuMemHostRegister"); }
CUresult cuMemHostUnregister(void*) { return note("cuMemHostUnregister"); }
CUresult cuStreamSynchronize(CUstream) { return note("cuStreamSynchronize"); }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*) {
  return note("cuThreadExchangeStreamCaptureMode");
}

// A map that tells its address and box, by which tests know it.
#if !defined(FAKE_DRIVER_BEFORE_CUDA_12)
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* extents, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  last_encoded = {};
  last_encoded.type = type;
  last_encoded.rank = static_cast<int>(rank);
  last_encoded.address = address;
  std::copy_n(extents, rank, last_encoded.extents);
  std::copy_n(strides, rank - 1, last_encoded.strides);
  std::copy_n(box, rank, last_encoded.box);
  std::copy_n(element_strides, rank, last_encoded.element_strides);
  last_encoded.interleave = interleave;
  last_encoded.swizzle = swizzle;
  last_encoded.promotion = promotion;
  last_encoded.fill = fill;
  *map = {};
  map->opaque[0] = reinterpret_cast<uintptr_t>(address);
  map->opaque[1] = box[0];
  return contexts > 0 ? note("cuTensorMapEncodeTiled") : CUDA_ERROR_INVALID_CONTEXT;
}
#endif

}  // extern "C"
