#include "device/occupancy.h"

#include <cuda_occupancy.h>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

cudaOccDeviceProp properties_of(const Arch& arch) {
  cudaOccDeviceProp properties;
  properties.computeMajor = arch.major;
  properties.computeMinor = arch.minor;
  properties.maxThreadsPerBlock = arch.max_threads_per_block;
  properties.maxThreadsPerMultiprocessor = arch.max_threads_per_sm;
  properties.regsPerBlock = arch.registers_per_block;
  properties.regsPerMultiprocessor = arch.registers_per_sm;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = static_cast<size_t>(arch.shared_per_block);
  properties.sharedMemPerMultiprocessor = static_cast<size_t>(arch.shared_per_sm);
  properties.numSms = arch.sm_count;
  properties.sharedMemPerBlockOptin = static_cast<size_t>(arch.shared_per_block_optin);
  properties.reservedSharedMemPerBlock = static_cast<size_t>(arch.reserved_shared_per_block);
  return properties;
}

// What the toolkit's own calculator says.
int reference(const Arch& arch, int threads, int registers, size_t shared) {
  const cudaOccDeviceProp properties = properties_of(arch);
  cudaOccFuncAttributes attributes;
  attributes.maxThreadsPerBlock = arch.max_threads_per_block;
  attributes.numRegs = registers;
  attributes.sharedSizeBytes = 0;
  attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
  attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  attributes.maxDynamicSharedSizeBytes = shared;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
      &result, &properties, &attributes, &state, threads, shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

TEST(Occupancy, AgreesWithTheToolkitsCalculator) {
  int compared = 0;
  for (const Arch* arch : {&a100(), &h100()}) {
    for (int threads : {1, 32, 33, 64, 96, 128, 160, 256, 384, 512, 768, 1024}) {
      for (int registers : {16, 32, 40, 64, 96, 128, 168, 232, 255}) {
        for (size_t shared : {0, 1, 1000, 16384, 49152, 65536, 100000, 163840, 166912, 232448}) {
          const int expected = reference(*arch, threads, registers, shared);
          if (expected < 0) continue;
          EXPECT_EQ(occupancy_of(*arch, threads, registers, shared).ctas_per_sm, expected)
              << arch->name << ", " << threads << " threads, " << registers << " registers, "
              << shared << " bytes";
          ++compared;
        }
      }
    }
  }
  EXPECT_GT(compared, 1500);
}

TEST(Occupancy, NamesTheLimit) {
  EXPECT_STREQ(occupancy_of(a100(), 1024, 16, 0).limit, "threads");
  EXPECT_STREQ(occupancy_of(a100(), 32, 16, 0).limit, "CTAs");
  EXPECT_STREQ(occupancy_of(a100(), 128, 255, 0).limit, "registers");
  EXPECT_STREQ(occupancy_of(a100(), 128, 32, 100000).limit, "shared memory");
}

using DriverOccupancy = DriverTest;

TEST_F(DriverOccupancy, OfAFunction) {
  const CUfunction bounded = load(kAxpy, "bounded");
  int ctas = -1;
  EXPECT_CU(CUDA_SUCCESS, cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, bounded, 64, 0));
  EXPECT_EQ(ctas, 32);
  EXPECT_CU(CUDA_SUCCESS,
            cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, bounded, 64, 40 * 1024));
  EXPECT_EQ(ctas, 3);
  EXPECT_CU(CUDA_SUCCESS, cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, bounded, 65, 0));
  EXPECT_EQ(ctas, 0) << "more than .maxntid";
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, bounded, 0, 0));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, bounded, -32, 0));
  int grid = 0, block = 0;
  EXPECT_CU(CUDA_SUCCESS, cuOccupancyMaxPotentialBlockSize(&grid, &block, bounded, nullptr, 0, 0));
  EXPECT_EQ(block, 64);
  EXPECT_EQ(grid, 32 * 108);
}

// ptxas spills rather than use more registers than the launch bounds leave.
TEST_F(DriverOccupancy, LaunchBoundsLimitRegisters) {
  constexpr int kAlive = 200;
  std::string body;
  for (int i = 0; i < kAlive; ++i) body += "mov.u32 %r" + std::to_string(i) + ", %clock;\n";
  for (int i = 1; i < kAlive; ++i) body += "add.u32 %r0, %r0, %r" + std::to_string(i) + ";\n";
  const std::string ptx =
      ".version 8.0\n.target sm_80\n.address_size 64\n"
      ".visible .entry k(.param .u64 p) .maxntid 512, 1, 1 .minnctapersm 2 {\n"
      ".reg .b32 %r<200>; .reg .b64 %rd; ld.param.u64 %rd, [p];\n" +
      body + "st.global.u32 [%rd], %r0;\nret;\n}\n";
  const CUfunction kernel = load(ptx.c_str(), "k");
  int registers = 0, ctas = 0;
  EXPECT_CU(CUDA_SUCCESS, cuFuncGetAttribute(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, kernel));
  EXPECT_EQ(registers, 64);
  EXPECT_CU(CUDA_SUCCESS, cuOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, 512, 0));
  EXPECT_EQ(ctas, 2);
}

}  // namespace
}  // namespace gpu_emulator::testing_support
