#pragma once

// What the emulated CUDA driver library offers beyond cuda.h. The driver API itself is used as on
// any machine: dlopen libgpu_emulator.so in place of libcuda.so.1. Device 0 is an A100 (sm_80),
// device 1 an H100 (sm_90a), 2 an RTX 3090 (sm_86), 3 an RTX 4090 (sm_89), 4 an RTX 5090 (sm_120,
// of which there is what sm_89 has). Device memory is host memory: cuMemHostRegister makes a host
// range visible to kernels at the same address.
//
// Differences from a GPU's driver: work runs inside the call that asks for it, on the calling
// thread and as many more as the option `threads` allows; a kernel's error is returned by the
// launch itself and leaves the context usable.

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Sets an option of a device, for the launches that follow. Names and values:
//   mode              eager | late | random  when asynchronous operations take effect; random also
//                                            shuffles warps
//   seed              integer                of mode random
//   checks            all | memory | none    which kinds of reports launches make; behind it, in
//                                            any number, +kind and -kind for single ones, as in
//                                            all-proxy_fence-init_fence. A comma may stand before
//                                            each sign. Default: all
//   threads           integer                CPU threads that run CTAs; 0 = all
//   count             0 | 1                  whether counters are kept
//   max_instructions  integer                of a warp, after which a launch fails; 0 = no limit
//   delete_line       integer                a line of PTX whose instruction launches leave out,
//                                            for mutation tests; 0 = none
//   replace_lines     text                   the same with other text: lines "NUMBER TEXT", each of
//                                            which takes the place of that line; empty = none
//   delete_in         kernel's name          whose launches do either; empty = those of any
//   sms               integer                multiprocessors that the device has, at least 1. A
//                                            program may ask for their number once: set it before
// Returns a CUresult: CUDA_ERROR_INVALID_VALUE for an unknown name or value (gpuEmulatorLastReport
// lists the kinds then), CUDA_ERROR_INVALID_DEVICE.
//
// Kinds of reports; README.md says what each is. A report ends with its kind.
//   all:
//     race, in_flight, proxy_fence, init_fence, undefined_address, undefined_guard,
//     undefined_store, undefined_atomic
//   all and memory:
//     wgmma_fence, wgmma_registers, aligned_barrier, barrier_again, barrier_reduction,
//     mbarrier_again, bulk_wait, copy_at_exit, uniform_branch, shuffle_lane
//   always, as execution cannot go on:
//     out_of_bounds, misaligned, wild_pointer, read_only, barrier, mbarrier, divergence,
//     wgmma_wait, deadlock, instruction_limit, unsupported, invalid_operand, trap, assertion,
//     invalid_launch
int gpuEmulatorSetOption(int device, const char* name, const char* value);

// Why the last call failed that failed on this device, a launch, the load of a module or any other;
// "" after a launch without errors. Copies at most size - 1 characters and a terminating zero to
// text, which may be null; returns the whole length without the zero.
size_t gpuEmulatorLastReport(int device, char* text, size_t size);

// Counters of this device's launches since the last reset: as JSON, one object a kernel name, and
// as a table for people. Both copy as gpuEmulatorLastReport does.
size_t gpuEmulatorCounters(int device, char* json, size_t size);
size_t gpuEmulatorCountersTable(int device, char* table, size_t size);
void gpuEmulatorResetCounters(int device);

#ifdef __cplusplus
}
#endif
