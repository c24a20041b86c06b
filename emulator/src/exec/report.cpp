#include "report.h"

#include <cstdarg>
#include <cstdio>

#include "cta.h"

namespace gpu_emulator::exec {

const char* name_of(ReportKind kind) {
  switch (kind) {
    case ReportKind::kOutOfBounds:
      return "out of bounds";
    case ReportKind::kMisaligned:
      return "misaligned address";
    case ReportKind::kWildPointer:
      return "wild pointer";
    case ReportKind::kReadOnly:
      return "store to read-only memory";
    case ReportKind::kUninitialised:
      return "uninitialised value";
    case ReportKind::kInFlight:
      return "asynchronous operation in flight";
    case ReportKind::kRace:
      return "race";
    case ReportKind::kMissingFence:
      return "missing fence";
    case ReportKind::kBarrierMisuse:
      return "barrier misuse";
    case ReportKind::kMbarrierMisuse:
      return "mbarrier misuse";
    case ReportKind::kDivergence:
      return "divergence";
    case ReportKind::kDeadlock:
      return "deadlock";
    case ReportKind::kInstructionLimit:
      return "instruction limit";
    case ReportKind::kUnsupported:
      return "unsupported instruction";
    case ReportKind::kInvalidOperand:
      return "invalid operand";
    case ReportKind::kNotWaitedFor:
      return "operation not waited for";
    case ReportKind::kTrap:
      return "trap";
    case ReportKind::kAssert:
      return "assertion";
    case ReportKind::kInvalidLaunch:
      return "invalid launch";
    case ReportKind::kInternal:
      return "internal error";
  }
  return "internal error";
}

// Values of CUresult (cuda.h), which this folder does not include.
int cuda_error_of(ReportKind kind) {
  switch (kind) {
    case ReportKind::kInvalidLaunch:
      return 1;  // CUDA_ERROR_INVALID_VALUE
    case ReportKind::kOutOfBounds:
    case ReportKind::kWildPointer:
    case ReportKind::kReadOnly:
      return 700;  // CUDA_ERROR_ILLEGAL_ADDRESS
    case ReportKind::kDeadlock:
    case ReportKind::kInstructionLimit:
      return 702;  // CUDA_ERROR_LAUNCH_TIMEOUT
    case ReportKind::kAssert:
      return 710;  // CUDA_ERROR_ASSERT
    case ReportKind::kUnsupported:
    case ReportKind::kInvalidOperand:
      return 715;  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    case ReportKind::kMisaligned:
      return 716;  // CUDA_ERROR_MISALIGNED_ADDRESS
    default:
      return 719;  // CUDA_ERROR_LAUNCH_FAILED
  }
}

std::string format(const char* pattern, ...) {
  va_list arguments, again;
  va_start(arguments, pattern);
  va_copy(again, arguments);
  std::string text(std::vsnprintf(nullptr, 0, pattern, arguments), '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  va_end(arguments);
  return text;
}

namespace {

std::string trimmed(const std::string& line) {
  constexpr size_t kLongest = 200;
  const size_t begin = line.find_first_not_of(" \t");
  if (begin == std::string::npos) return "";
  const size_t end = line.find_last_not_of(" \t\r");
  std::string text = line.substr(begin, end - begin + 1);
  return text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
}

}  // namespace

std::string describe_place(const Program& program, const Function& function, uint32_t pc) {
  if (pc >= function.lines.size()) return "the end of function " + function.name;
  const int line = function.lines[pc];
  std::string text = format("PTX line %d: ", line);
  if (line >= 1 && static_cast<size_t>(line) <= program.source_lines.size()) {
    text += trimmed(program.source_lines[line - 1]);
  }
  const ptx::SourceLocation& source = function.sources[pc];
  if (source.file > 0 && static_cast<size_t>(source.file) < program.files.size()) {
    text += format(" (%s:%d)", program.files[source.file].c_str(), source.line);
  }
  return text;
}

std::string where(const Warp& warp, int lane) {
  const LaunchState& launch = launch_of(warp);
  const auto& id = warp.cta->id;
  std::string text = format("kernel %s, CTA (%u,%u,%u), warp %u", launch.entry->name.c_str(), id[0],
                            id[1], id[2], warp.id);
  if (lane >= 0) text += format(", lane %d", lane);
  if (warp.function != launch.entry) text += ", in function " + warp.function->name;
  return text + ", " + describe_place(*launch.launch->program, *warp.function, warp.pc);
}

void fail(const Warp& warp, int lane, ReportKind kind, const std::string& message) {
  throw Failure(kind, message + "\n  at " + where(warp, lane));
}

}  // namespace gpu_emulator::exec
