#pragma once

// The kinds of reports: one table of them all, and which of them a launch makes.

#include <bitset>
#include <cstdint>
#include <string>
#include <string_view>

namespace gpu_emulator::exec {

enum class ReportKind : uint8_t {
  // Found by the checker, which follows every access and value.
  kRace,
  kInFlight,
  kProxyFence,
  kInitFence,
  kUndefinedAddress,
  kUndefinedGuard,
  kUndefinedStore,
  kUndefinedAtomic,
  // Found by the instruction itself, which can go on.
  kWgmmaFence,
  kWgmmaRegisters,
  kAlignedBarrier,
  kBarrierAgain,
  kBarrierReduction,
  kMbarrierAgain,
  kBulkWait,
  kCopyAtExit,
  kUniformBranch,
  kShuffleLane,
  // Execution cannot go on.
  kOutOfBounds,
  kMisaligned,
  kWildPointer,  // no range at all at this address
  kReadOnly,
  kBarrier,
  kMbarrier,
  kDivergence,
  kWgmmaWait,
  kDeadlock,
  kInstructionLimit,
  kUnsupported,     // opcode form the emulator does not know
  kInvalidOperand,  // value that PTX forbids: group count, tensor map, descriptor, ...
  kTrap,
  kAssertion,
  kInvalidLaunch,  // the launch exceeds the device's or the kernel's limits
  kInternal,
};
inline constexpr int kReportKinds = static_cast<int>(ReportKind::kInternal) + 1;

enum class ReportGroup : uint8_t {
  kFollowed,  // made under `all`, as it costs time
  kSeen,      // made under `all` and `memory`
  kAlways,
};

struct ReportInfo {
  ReportKind kind;
  const char* name;  // stable: Report::kind, and what the option `checks` calls it
  ReportGroup group;
  int cuda_error;        // CUresult
  const char* sentence;  // what is reported, without a full stop
};
const ReportInfo& info_of(ReportKind kind);

// The kinds that a launch reports. Those of ReportGroup::kAlways are always in it.
class Checks {
 public:
  static Checks all() { return up_to(ReportGroup::kFollowed); }
  static Checks memory() { return up_to(ReportGroup::kSeen); }
  static Checks none() { return up_to(ReportGroup::kAlways); }

  // The value of the option `checks`: all, memory or none (absent: all), then any of +kind and
  // -kind, between which commas may stand. Throws std::invalid_argument with a sentence.
  static Checks parse(std::string_view value);

  bool operator[](ReportKind kind) const { return kinds_[static_cast<size_t>(kind)]; }
  bool operator==(const Checks&) const = default;

  bool order_accesses() const;  // some kind needs to know which accesses come after which
  bool follow_values() const;   // some kind needs to know which values are undefined
  bool need_checker() const;    // some kind needs the checker at all

 private:
  static Checks up_to(ReportGroup group);
  std::bitset<kReportKinds> kinds_;
};

}  // namespace gpu_emulator::exec
