#include "report.h"

#include <cstdarg>
#include <cstdio>

#include "cta.h"

namespace gpu_emulator::exec {

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
  if (line >= 1 && static_cast<size_t>(line) <= program.source_lines->size()) {
    text += trimmed((*program.source_lines)[line - 1]);
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

bool reports(const Warp& warp, ReportKind kind) { return launch_of(warp).options->checks[kind]; }

Report report_of(ReportKind kind, const std::string& text) {
  const ReportInfo& info = info_of(kind);
  std::string line = "\n  kind: " + std::string(info.name);
  if (info.group != ReportGroup::kAlways) {
    line += " (checks=all-" + std::string(info.name) + " switches such reports off)";
  }
  return {info.cuda_error, info.name, text + line};
}

void fail(const Warp& warp, int lane, ReportKind kind, const std::string& message) {
  throw Failure(kind, message + "\n  at " + where(warp, lane));
}

}  // namespace gpu_emulator::exec
