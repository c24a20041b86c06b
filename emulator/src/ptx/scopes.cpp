#include "scopes.h"

#include <charconv>
#include <string>

namespace gpu_emulator::ptx {
namespace {

constexpr int kMaxRegisterLanes = 8;
// Far beyond what compilers write; they keep look-ups in hostile texts short.
constexpr int kMaxScopeDepth = 100;
constexpr size_t kMaxRangesPerScope = 500;

}  // namespace

void Scopes::open() {
  const int depth = current_ < 0 ? 0 : scopes_[current_].depth + 1;
  if (depth > kMaxScopeDepth) tokens_.fail("scopes nested too deeply");
  scopes_.push_back({current_, depth, {}, {}});
  current_ = static_cast<int>(scopes_.size()) - 1;
}

void Scopes::bind(std::string_view name, Symbol symbol) {
  if (!scopes_[current_].symbols.emplace(name, symbol).second) {
    tokens_.fail("'" + std::string(name.substr(0, 60)) + "' is declared twice");
  }
}

void Scopes::bind_register(std::string_view name, Type type, int lanes) {
  bind(name, make_register(name, type, lanes));
}

void Scopes::add_range(const RegisterRange& range) {
  std::vector<RegisterRange>& ranges = scopes_[current_].ranges;
  if (ranges.size() == kMaxRangesPerScope) tokens_.fail("too many register ranges in a scope");
  ranges.push_back(range);
}

Symbol Scopes::make_register(std::string_view name, Type type, int lanes) {
  static constexpr const char* kSuffix[kMaxRegisterLanes] = {".x", ".y", ".z", ".w",
                                                             ".4", ".5", ".6", ".7"};
  const int first = static_cast<int>(function_.registers.size());
  for (int lane = 0; lane < lanes; ++lane) {
    function_.registers.push_back({std::string(name) + (lanes > 1 ? kSuffix[lane] : ""), type});
  }
  return {Symbol::Kind::kRegister, first, lanes};
}

// The register `name` of one of the scope's ranges, made now.
const Symbol* Scopes::symbol_from_range(Scope& scope, std::string_view name) {
  for (const RegisterRange& range : scope.ranges) {
    if (!name.starts_with(range.prefix)) continue;
    const std::string_view digits = name.substr(range.prefix.size());
    uint64_t number = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    const bool is_number = result.ec == std::errc() && result.ptr == digits.data() + digits.size();
    if (!is_number || number >= range.count || (digits.size() > 1 && digits[0] == '0')) continue;
    return &scope.symbols.emplace(name, make_register(name, range.type, range.lanes)).first->second;
  }
  return nullptr;
}

const Symbol* Scopes::find(std::string_view name) {
  for (int scope = current_; scope >= 0; scope = scopes_[scope].parent) {
    const auto it = scopes_[scope].symbols.find(name);
    if (it != scopes_[scope].symbols.end()) return &it->second;
    if (const Symbol* symbol = symbol_from_range(scopes_[scope], name)) return symbol;
  }
  return nullptr;
}

const Symbol* Scopes::find_declared(std::string_view name, int scope) const {
  for (; scope >= 0; scope = scopes_[scope].parent) {
    const auto it = scopes_[scope].symbols.find(name);
    if (it != scopes_[scope].symbols.end()) return &it->second;
  }
  return nullptr;
}

}  // namespace gpu_emulator::ptx
