#pragma once

// How execution stops: a Failure carries what went wrong and where.

#include <cstdint>
#include <stdexcept>
#include <string>

#include "report_kinds.h"

namespace gpu_emulator {
struct Report;
}

namespace gpu_emulator::exec {

struct Function;
struct Program;
struct Warp;

class Failure : public std::runtime_error {
 public:
  Failure(ReportKind kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
  ReportKind kind;
};

// Throws a Failure whose text is the message, then kernel, CTA, warp, lane, PTX line and its text,
// and the source line where the PTX has one. lane < 0: the whole warp.
[[noreturn]] void fail(const Warp& warp, int lane, ReportKind kind, const std::string& message);

// Whether the launch makes reports of this kind; where not, the handler goes on.
bool reports(const Warp& warp, ReportKind kind);

// What the caller of a launch is told: the text, and last the kind.
Report report_of(ReportKind kind, const std::string& text);

// "kernel k, CTA (0,0,0), warp 1, lane 3, PTX line 120: ld.global..., file.cu:17"
std::string where(const Warp& warp, int lane);

// "PTX line 120: ld.global..., (file.cu:17)"
std::string describe_place(const Program& program, const Function& function, uint32_t pc);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace gpu_emulator::exec
