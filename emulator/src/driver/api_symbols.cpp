// cuGetProcAddress, and entry points under the names and with the arguments of older CUDA versions.

#include <array>

#include "arguments.h"

// cuda.h gives these names to the newest version of each function.
#undef cuCtxCreate
#undef cuEventElapsedTime
#undef cuGetProcAddress

#pragma GCC visibility push(default)
extern "C" {
CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device);
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end);
CUresult cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t flags);
}
#pragma GCC visibility pop

using namespace gpu_emulator::driver;

namespace {

struct Entry {
  std::string_view name;
  int since;  // the CUDA version that gave the name this function; 0 = the first
  void* function;
};

void* address_of(auto* function) { return reinterpret_cast<void*>(function); }

#define ENTRY(name) \
  Entry { #name, 0, address_of(&name) }
const auto& entries() {
  static const auto table = std::to_array<Entry>({
      {"cuCtxCreate", 3020, address_of(&cuCtxCreate_v2)},
      {"cuCtxCreate", 12050, address_of(&cuCtxCreate_v4)},
      ENTRY(cuCtxDestroy),
      ENTRY(cuCtxGetApiVersion),
      ENTRY(cuCtxGetCurrent),
      ENTRY(cuCtxGetDevice),
      ENTRY(cuCtxGetFlags),
      ENTRY(cuCtxGetId),
      ENTRY(cuCtxGetStreamPriorityRange),
      ENTRY(cuCtxPopCurrent),
      ENTRY(cuCtxPushCurrent),
      ENTRY(cuCtxSetCurrent),
      ENTRY(cuCtxSynchronize),
      ENTRY(cuDeviceCanAccessPeer),
      ENTRY(cuDeviceGet),
      ENTRY(cuDeviceGetAttribute),
      ENTRY(cuDeviceGetCount),
      ENTRY(cuDeviceGetName),
      ENTRY(cuDeviceGetPCIBusId),
      ENTRY(cuDeviceGetUuid),
      ENTRY(cuDevicePrimaryCtxGetState),
      ENTRY(cuDevicePrimaryCtxRelease),
      ENTRY(cuDevicePrimaryCtxReset),
      ENTRY(cuDevicePrimaryCtxRetain),
      ENTRY(cuDevicePrimaryCtxSetFlags),
      ENTRY(cuDeviceTotalMem),
      ENTRY(cuDriverGetVersion),
      ENTRY(cuEventCreate),
      ENTRY(cuEventDestroy),
      {"cuEventElapsedTime", 0, address_of(&cuEventElapsedTime)},
      {"cuEventElapsedTime", 12080, address_of(&cuEventElapsedTime_v2)},
      ENTRY(cuEventQuery),
      ENTRY(cuEventRecord),
      ENTRY(cuEventRecordWithFlags),
      ENTRY(cuEventSynchronize),
      ENTRY(cuFuncGetAttribute),
      ENTRY(cuFuncGetModule),
      ENTRY(cuFuncGetName),
      ENTRY(cuFuncGetParamInfo),
      ENTRY(cuFuncSetAttribute),
      ENTRY(cuFuncSetCacheConfig),
      ENTRY(cuGetErrorName),
      ENTRY(cuGetErrorString),
      {"cuGetProcAddress", 11030, address_of(&cuGetProcAddress)},
      {"cuGetProcAddress", 12000, address_of(&cuGetProcAddress_v2)},
      ENTRY(cuGraphDestroy),
      ENTRY(cuGraphExecDestroy),
      ENTRY(cuGraphInstantiate),
      ENTRY(cuGraphInstantiateWithFlags),
      ENTRY(cuGraphLaunch),
      ENTRY(cuGraphUpload),
      ENTRY(cuInit),
      ENTRY(cuKernelGetAttribute),
      ENTRY(cuKernelGetFunction),
      ENTRY(cuKernelGetLibrary),
      ENTRY(cuKernelGetName),
      ENTRY(cuKernelSetAttribute),
      ENTRY(cuLaunchCooperativeKernel),
      ENTRY(cuLaunchHostFunc),
      ENTRY(cuLaunchKernel),
      ENTRY(cuLaunchKernelEx),
      ENTRY(cuLibraryGetGlobal),
      ENTRY(cuLibraryGetKernel),
      ENTRY(cuLibraryLoadData),
      ENTRY(cuLibraryUnload),
      ENTRY(cuMemAlloc),
      ENTRY(cuMemAllocHost),
      ENTRY(cuMemAllocManaged),
      ENTRY(cuMemAllocPitch),
      ENTRY(cuMemFree),
      ENTRY(cuMemFreeHost),
      ENTRY(cuMemGetAddressRange),
      ENTRY(cuMemGetInfo),
      ENTRY(cuMemHostAlloc),
      ENTRY(cuMemHostGetDevicePointer),
      ENTRY(cuMemHostGetFlags),
      ENTRY(cuMemHostRegister),
      ENTRY(cuMemHostUnregister),
      ENTRY(cuMemcpy),
      ENTRY(cuMemcpy2D),
      ENTRY(cuMemcpy2DAsync),
      ENTRY(cuMemcpy2DUnaligned),
      ENTRY(cuMemcpyAsync),
      ENTRY(cuMemcpyDtoD),
      ENTRY(cuMemcpyDtoDAsync),
      ENTRY(cuMemcpyDtoH),
      ENTRY(cuMemcpyDtoHAsync),
      ENTRY(cuMemcpyHtoD),
      ENTRY(cuMemcpyHtoDAsync),
      ENTRY(cuMemsetD16),
      ENTRY(cuMemsetD16Async),
      ENTRY(cuMemsetD2D16),
      ENTRY(cuMemsetD2D16Async),
      ENTRY(cuMemsetD2D32),
      ENTRY(cuMemsetD2D32Async),
      ENTRY(cuMemsetD2D8),
      ENTRY(cuMemsetD2D8Async),
      ENTRY(cuMemsetD32),
      ENTRY(cuMemsetD32Async),
      ENTRY(cuMemsetD8),
      ENTRY(cuMemsetD8Async),
      ENTRY(cuModuleGetFunction),
      ENTRY(cuModuleGetGlobal),
      ENTRY(cuModuleGetLoadingMode),
      ENTRY(cuModuleLoadData),
      ENTRY(cuModuleLoadDataEx),
      ENTRY(cuModuleLoadFatBinary),
      ENTRY(cuModuleUnload),
      ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor),
      ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags),
      ENTRY(cuOccupancyMaxActiveClusters),
      ENTRY(cuOccupancyMaxPotentialBlockSize),
      ENTRY(cuOccupancyMaxPotentialBlockSizeWithFlags),
      ENTRY(cuOccupancyMaxPotentialClusterSize),
      ENTRY(cuPointerGetAttribute),
      ENTRY(cuPointerGetAttributes),
      ENTRY(cuStreamBeginCapture),
      ENTRY(cuStreamCreate),
      ENTRY(cuStreamCreateWithPriority),
      ENTRY(cuStreamDestroy),
      ENTRY(cuStreamEndCapture),
      {"cuStreamGetCaptureInfo", 12030, address_of(&cuStreamGetCaptureInfo)},
      ENTRY(cuStreamGetCtx),
      ENTRY(cuStreamGetDevice),
      ENTRY(cuStreamGetFlags),
      ENTRY(cuStreamGetId),
      ENTRY(cuStreamGetPriority),
      ENTRY(cuStreamIsCapturing),
      ENTRY(cuStreamQuery),
      ENTRY(cuStreamSynchronize),
      ENTRY(cuStreamWaitEvent),
      ENTRY(cuTensorMapEncodeTiled),
      ENTRY(cuTensorMapReplaceAddress),
      ENTRY(cuThreadExchangeStreamCaptureMode),
  });
  return table;
}
#undef ENTRY

// Null if no function of this name is as old as `version`.
void* find(std::string_view name, int version, CUdriverProcAddressQueryResult& result) {
  const Entry* best = nullptr;
  result = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  for (const Entry& entry : entries()) {
    if (entry.name != name) continue;
    if (!best) result = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    if (entry.since > version || (best && best->since > entry.since)) continue;
    best = &entry;
    result = CU_GET_PROC_ADDRESS_SUCCESS;
  }
  return best ? best->function : nullptr;
}

CUresult get(const char* symbol, void** function, int version,
             CUdriverProcAddressQueryResult* status) {
  return guarded_uninitialised([&](Driver&) {
    const std::string name = take_string(symbol, "symbol");
    CUdriverProcAddressQueryResult result;
    give(function, find(name, version, result), "pfn");
    give_optional(status, result, "symbolStatus");
    // With a status the call succeeds and the status says whether the symbol was found.
    if (result != CU_GET_PROC_ADDRESS_SUCCESS && !status) {
      fail(CUDA_ERROR_NOT_FOUND, "The emulated driver has no entry point '" + name.substr(0, 100) +
                                     "' for this version.");
    }
  });
}

}  // namespace

CUresult cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t) {
  return get(symbol, function, version, nullptr);
}

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, cuuint64_t,
                             CUdriverProcAddressQueryResult* status) {
  return get(symbol, function, version, status);
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device) {
  return cuCtxCreate_v4(context, nullptr, flags, device);
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}
