#pragma once

// What the emulated CUDA driver library offers beyond cuda.h. The driver API itself is used as on
// any machine: dlopen libgpu_emulator.so in place of libcuda.so.1. Device 0 is an A100 (sm_80),
// device 1 an H100 (sm_90a). Device memory is host memory: cuMemHostRegister makes a host range
// visible to kernels at the same address.

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Options of a device, for the launches that follow. Names and values:
//   mode     eager | late | random     when asynchronous operations take effect; random also
//   shuffles warps seed     integer                   of mode random checks   none | memory | all
//   all: bounds, alignment, uninitialised values, races threads  integer                   CPU
//   threads that run CTAs; 0 = all count    0 | 1
// Returns a CUresult: CUDA_ERROR_INVALID_VALUE for an unknown name or value,
// CUDA_ERROR_INVALID_DEVICE.
int gpuEmulatorSetOption(int device, const char* name, const char* value);

// The sentence(s) of the last failed launch or module load of this device, "" = none. Copies at
// most size - 1 characters and a terminating zero; returns the whole length without the zero.
size_t gpuEmulatorLastReport(int device, char* text, size_t size);

// Counters of this device's launches since the last reset, as JSON: one object a kernel name.
// Copies as gpuEmulatorLastReport does.
size_t gpuEmulatorCounters(int device, char* json, size_t size);
void gpuEmulatorResetCounters(int device);

#ifdef __cplusplus
}
#endif
