#pragma once

// How execution stops: a Failure carries what went wrong and where. The kinds are a closed list;
// Report::kind (device.h) is name_of(kind).

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gpu_emulator::exec {

struct Function;
struct Program;
struct Warp;

enum class ReportKind : uint8_t {
  kOutOfBounds,
  kMisaligned,
  kWildPointer,    // no range at all at this address
  kReadOnly,       // store to memory that kernels may only read
  kUninitialised,  // an undefined value reached an output, an address or a branch
  kInFlight,       // bytes touched that an asynchronous operation still writes or reads
  kRace,
  kMissingFence,  // generic-proxy writes read by the async proxy without a proxy fence, ...
  kBarrierMisuse,
  kMbarrierMisuse,
  kDivergence,  // .aligned or .uni form executed by a part of its warp
  kDeadlock,
  kInstructionLimit,
  kUnsupported,     // opcode form the emulator does not know
  kInvalidOperand,  // value that PTX forbids: group count, tensor map, descriptor, ...
  kNotWaitedFor,    // exit with asynchronous operations in flight that read shared memory
  kTrap,
  kAssert,
  kInvalidLaunch,  // the launch exceeds the device's or the kernel's limits
  kInternal,
};
const char* name_of(ReportKind kind);
int cuda_error_of(ReportKind kind);  // CUresult

class Failure : public std::runtime_error {
 public:
  Failure(ReportKind kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
  ReportKind kind;
};

// Throws a Failure whose text is the message, then kernel, CTA, warp, lane, PTX line and its text,
// and the source line where the PTX has one. lane < 0: the whole warp.
[[noreturn]] void fail(const Warp& warp, int lane, ReportKind kind, const std::string& message);

// "kernel k, CTA (0,0,0), warp 1, lane 3, PTX line 120: ld.global..., file.cu:17"
std::string where(const Warp& warp, int lane);

// "PTX line 120: ld.global..., (file.cu:17)"
std::string describe_place(const Program& program, const Function& function, uint32_t pc);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace gpu_emulator::exec
