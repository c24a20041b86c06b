#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "token_stream.h"

namespace gpu_emulator::ptx {

std::optional<Type> type_from_name(std::string_view name);    // "b32", ...
std::optional<Space> space_from_name(std::string_view name);  // "global", ...
bool is_special_register(std::string_view name);              // "%tid.x", ...

// The module being built, with its names. Keys point into the text.
struct ModuleNames {
  Module module;
  std::unordered_map<std::string_view, int> variables;
  std::unordered_map<std::string_view, int> functions;
  std::vector<std::pair<int, int>> aliases;  // function, the one it stands for
  size_t initializer_budget = 0;
};

// The names of the variables that parse_variables declares are handed to this.
class VariableSink {
 public:
  virtual ~VariableSink() = default;
  virtual void declare(std::string_view name, Variable variable) = 0;
};

// `.align 8 .b8 a[16] = {...}, b;` after the state space, up to and with the semicolon.
void parse_variables(TokenStream& tokens, ModuleNames& names, Space space, bool is_extern,
                     VariableSink& sink);

// `( .param .b32 a, .reg .f32 b )`; the cursor before the parenthesis.
std::vector<Variable> parse_parameters(TokenStream& tokens);

// The body of `function`, the cursor behind its opening brace; reads the closing one.
void parse_body(TokenStream& tokens, ModuleNames& names, Function& function);

}  // namespace gpu_emulator::ptx
