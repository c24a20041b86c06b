#include "report_kinds.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace gpu_emulator::exec {
namespace {

// Of CUresult (cuda.h), which this folder does not include.
constexpr int kInvalidValue = 1, kIllegalAddress = 700, kLaunchTimeout = 702, kAssert = 710,
              kIllegalInstruction = 715, kMisalignedAddress = 716, kLaunchFailed = 719;

constexpr ReportGroup kFollowed = ReportGroup::kFollowed, kSeen = ReportGroup::kSeen,
                      kAlways = ReportGroup::kAlways;

// In the order of ReportKind.
constexpr ReportInfo kTable[] = {
    {ReportKind::kRace, "race", kFollowed, kLaunchFailed,
     "two accesses to one place, one of them a write, that nothing orders"},
    {ReportKind::kInFlight, "in_flight", kFollowed, kLaunchFailed,
     "memory touched that an asynchronous operation still writes or reads"},
    {ReportKind::kProxyFence, "proxy_fence", kFollowed, kLaunchFailed,
     "the async proxy touches what the generic proxy wrote, without fence.proxy.async between"},
    {ReportKind::kInitFence, "init_fence", kFollowed, kLaunchFailed,
     "the async proxy signals an mbarrier without a fence after its mbarrier.init"},
    {ReportKind::kUndefinedAddress, "undefined_address", kFollowed, kLaunchFailed,
     "an undefined value is an address, or an operand that must be known"},
    {ReportKind::kUndefinedGuard, "undefined_guard", kFollowed, kLaunchFailed,
     "an undefined value decides whether an instruction is executed"},
    {ReportKind::kUndefinedStore, "undefined_store", kFollowed, kLaunchFailed,
     "an undefined value is written to global memory"},
    {ReportKind::kUndefinedAtomic, "undefined_atomic", kFollowed, kLaunchFailed,
     "an atomic operation adds to global memory that was never written"},

    {ReportKind::kWgmmaFence, "wgmma_fence", kSeen, kLaunchFailed,
     "wgmma.mma_async without a wgmma.fence after the last accesses to its registers"},
    {ReportKind::kWgmmaRegisters, "wgmma_registers", kSeen, kLaunchFailed,
     "a register of a wgmma in flight is written, or used in another role"},
    {ReportKind::kAlignedBarrier, "aligned_barrier", kSeen, kLaunchFailed,
     "an .aligned barrier is executed by a part of its warp"},
    {ReportKind::kBarrierAgain, "barrier_again", kSeen, kLaunchFailed,
     "a warp arrives twice in one phase of a barrier without a thread count"},
    {ReportKind::kBarrierReduction, "barrier_reduction", kSeen, kLaunchFailed,
     "barrier.red meets barrier.sync or barrier.arrive in one phase of a barrier"},
    {ReportKind::kMbarrierAgain, "mbarrier_again", kSeen, kLaunchFailed,
     "mbarrier.init of an mbarrier that is valid already"},
    {ReportKind::kBulkWait, "bulk_wait", kSeen, kLaunchFailed,
     "a thread exits before the wait for its bulk copy that reads shared memory"},
    {ReportKind::kCopyAtExit, "copy_at_exit", kSeen, kLaunchFailed,
     "a CTA's threads exit while a bulk copy into its shared memory is in flight"},
    {ReportKind::kUniformBranch, "uniform_branch", kSeen, kLaunchFailed,
     "bra.uni is taken by a part of the lanes that execute it"},
    {ReportKind::kShuffleLane, "shuffle_lane", kSeen, kLaunchFailed,
     "shfl.sync reads a lane that does not take part"},

    {ReportKind::kOutOfBounds, "out_of_bounds", kAlways, kIllegalAddress,
     "an access past the end of what is there"},
    {ReportKind::kMisaligned, "misaligned", kAlways, kMisalignedAddress,
     "an address that is no multiple of what the instruction asks for"},
    {ReportKind::kWildPointer, "wild_pointer", kAlways, kIllegalAddress,
     "an address where nothing is allocated"},
    {ReportKind::kReadOnly, "read_only", kAlways, kIllegalAddress,
     "a store to memory that kernels may only read"},
    {ReportKind::kBarrier, "barrier", kAlways, kLaunchFailed,
     "a barrier that is not there, with a wrong thread count, or waited for without an arrival"},
    {ReportKind::kMbarrier, "mbarrier", kAlways, kLaunchFailed,
     "an operation that the mbarrier's state does not allow"},
    {ReportKind::kDivergence, "divergence", kAlways, kLaunchFailed,
     "a part of the lanes or warps executes what all must execute together"},
    {ReportKind::kWgmmaWait, "wgmma_wait", kAlways, kLaunchFailed,
     "a warp exits, or leaves a function, before wgmma.wait_group"},
    {ReportKind::kDeadlock, "deadlock", kAlways, kLaunchTimeout, "no warp can go on"},
    {ReportKind::kInstructionLimit, "instruction_limit", kAlways, kLaunchTimeout,
     "more instructions than the option max_instructions allows"},
    {ReportKind::kUnsupported, "unsupported", kAlways, kIllegalInstruction,
     "an instruction that the emulator does not know"},
    {ReportKind::kInvalidOperand, "invalid_operand", kAlways, kIllegalInstruction,
     "a value that PTX forbids: a descriptor, a tensor map, a group count"},
    {ReportKind::kTrap, "trap", kAlways, kLaunchFailed, "the kernel executed a trap"},
    {ReportKind::kAssertion, "assertion", kAlways, kAssert, "a device-side assert failed"},
    {ReportKind::kInvalidLaunch, "invalid_launch", kAlways, kInvalidValue,
     "a launch beyond the device's or the kernel's limits"},
    {ReportKind::kInternal, "internal", kAlways, kLaunchFailed, "an error of the emulator"},
};
static_assert(std::size(kTable) == kReportKinds);
static_assert([] {
  for (int i = 0; i < kReportKinds; ++i) {
    if (kTable[i].kind != static_cast<ReportKind>(i)) return false;
  }
  return true;
}());

std::string switchable_names() {
  std::string names;
  for (const ReportInfo& info : kTable) {
    if (info.group == kAlways) continue;
    names += (names.empty() ? "" : ", ") + std::string(info.name);
  }
  return names;
}

[[noreturn]] void reject(const std::string& problem) {
  throw std::invalid_argument(problem + " The kinds that can be switched: " + switchable_names() +
                              ".");
}

std::string quoted(std::string_view word) {
  constexpr size_t kLongest = 60;
  return "'" + std::string(word.substr(0, kLongest)) + "'";
}

const ReportInfo& find(std::string_view name) {
  const auto* found = std::find_if(std::begin(kTable), std::end(kTable),
                                   [&](const ReportInfo& info) { return info.name == name; });
  if (found == std::end(kTable)) reject("Option checks has no kind " + quoted(name) + ".");
  if (found->group == kAlways) reject("Reports of kind " + quoted(name) + " are always made.");
  return *found;
}

}  // namespace

const ReportInfo& info_of(ReportKind kind) { return kTable[static_cast<int>(kind)]; }

Checks Checks::up_to(ReportGroup group) {
  Checks checks;
  for (const ReportInfo& info : kTable) {
    checks.kinds_[static_cast<size_t>(info.kind)] = info.group >= group;
  }
  return checks;
}

Checks Checks::parse(std::string_view value) {
  constexpr std::string_view kSigns = "+-";
  auto take_word = [&] {
    const std::string_view word = value.substr(0, value.find_first_of("+-,"));
    value.remove_prefix(word.size());
    return word;
  };
  const bool has_base = value.empty() || kSigns.find(value.front()) == std::string_view::npos;
  const std::string_view base = has_base ? take_word() : "all";
  Checks checks = base == "all" ? all() : base == "memory" ? memory() : none();
  if (base != "all" && base != "memory" && base != "none") {
    reject("Option checks has no value " + quoted(base) + ": it begins with all, memory or none.");
  }
  while (!value.empty()) {
    if (value.front() == ',') value.remove_prefix(1);
    if (value.empty() || kSigns.find(value.front()) == std::string_view::npos) {
      reject("Option checks has +kind or -kind in place of " + quoted(value) + ".");
    }
    const bool on = value.front() == '+';
    value.remove_prefix(1);
    checks.kinds_[static_cast<size_t>(find(take_word()).kind)] = on;
  }
  return checks;
}

bool Checks::order_accesses() const {
  const Checks& made = *this;
  return made[ReportKind::kRace] || made[ReportKind::kInFlight] || made[ReportKind::kProxyFence];
}

bool Checks::follow_values() const {
  const Checks& made = *this;
  return made[ReportKind::kUndefinedAddress] || made[ReportKind::kUndefinedGuard] ||
         made[ReportKind::kUndefinedStore] || made[ReportKind::kUndefinedAtomic];
}

bool Checks::need_checker() const {
  return order_accesses() || follow_values() || (*this)[ReportKind::kInitFence];
}

}  // namespace gpu_emulator::exec
