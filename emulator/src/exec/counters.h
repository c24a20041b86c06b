#pragma once

// What launches did, per kernel and per PTX line.

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gpu_emulator {

enum class InstructionClass : uint8_t {
  kInteger,
  kFloat,
  kConvert,
  kSpecialFunction,  // ex2, rcp, ...: one quarter rate on the GPU
  kMove,
  kCompare,  // setp, selp, predicate logic
  kControl,
  kLoad,
  kStore,
  kAtomic,
  kMatrixMove,  // ldmatrix, stmatrix
  kTensor,      // mma, wgmma
  kAsyncCopy,
  kBarrier,
  kWarp,  // shfl, vote, match, redux
  kOther,
  kCount,
};
const char* name_of(InstructionClass c);

struct InstructionCounters {
  uint64_t executed = 0;  // warp instructions
  // Shared memory: 128-byte wavefronts needed, and what they would be without bank conflicts.
  uint64_t wavefronts = 0, ideal_wavefronts = 0;
  // Global memory: requests, 32-byte sectors touched, and the fewest that hold the bytes asked for.
  uint64_t requests = 0, sectors = 0, ideal_sectors = 0;
  uint64_t bytes = 0;  // of active lanes

  InstructionCounters& operator+=(const InstructionCounters& other);
};

using SourceLines = std::vector<std::string>;

struct LineCounters : InstructionCounters {  // of one PTX instruction
  int line = 0;
  std::string_view text = {};  // in one of KernelCounters::sources
  InstructionClass instruction_class = InstructionClass::kOther;
};

struct KernelCounters {
  uint64_t launches = 0, ctas = 0, warps = 0;
  std::vector<LineCounters> lines;  // executed instructions of the entry and callees
  std::vector<std::shared_ptr<const SourceLines>> sources;
  // Occupancy of the last launch.
  int threads_per_cta = 0, registers_per_thread = 0;
  uint64_t shared_bytes_per_cta = 0;
  int ctas_per_sm = 0;
  std::string occupancy_limit;  // "registers", "shared memory", "threads", "CTAs"

  uint64_t warp_instructions() const;
  std::array<uint64_t, static_cast<size_t>(InstructionClass::kCount)> by_class() const;
  std::map<std::string, uint64_t> tensor_shapes() const;  // "mma.m16n8k16.bf16": instructions
};

struct Counters {
  std::map<std::string, KernelCounters> kernels;
  void add(const Counters& other);
  std::string json() const;
  std::string table() const;
};

}  // namespace gpu_emulator
