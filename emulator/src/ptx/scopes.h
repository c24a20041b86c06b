#pragma once

// What names mean in the body of a function: registers, variables, parameters and labels, in nested
// scopes.

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "token_stream.h"

namespace gpu_emulator::ptx {

struct Symbol {
  enum class Kind {
    kRegister,
    kVariable,
    kModuleVariable,
    kParam,
    kReturn,
    kLabel,
    kTargets,
    kName
  };
  Kind kind;
  int index = 0;
  int lanes = 1;  // kRegister
};

// `.reg .b32 %r<10>`: %r0 ... %r9, each made a register when it is first named.
struct RegisterRange {
  std::string_view prefix;
  uint64_t count;
  Type type;
  int lanes;
};

class Scopes {
 public:
  Scopes(TokenStream& tokens, Function& function) : tokens_(tokens), function_(function) {}

  void open();
  void close() { current_ = scopes_[current_].parent; }
  int current() const { return current_; }  // -1: none is open

  // In the current scope.
  void bind(std::string_view name, Symbol symbol);
  void bind_register(std::string_view name, Type type, int lanes);
  void add_range(const RegisterRange& range);

  // What `name` means at the cursor; nullptr: nothing yet.
  const Symbol* find(std::string_view name);
  // What `name` means in `scope`, once all scopes are complete.
  const Symbol* find_declared(std::string_view name, int scope) const;

 private:
  struct Scope {
    int parent;
    int depth;
    std::unordered_map<std::string_view, Symbol> symbols;
    std::vector<RegisterRange> ranges;
  };

  Symbol make_register(std::string_view name, Type type, int lanes);
  const Symbol* symbol_from_range(Scope& scope, std::string_view name);

  TokenStream& tokens_;
  Function& function_;
  std::vector<Scope> scopes_;
  int current_ = -1;
};

}  // namespace gpu_emulator::ptx
