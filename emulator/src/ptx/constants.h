#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "module.h"
#include "token_stream.h"

namespace gpu_emulator::ptx {

// An integer constant expression (PTX ISA 9.0, section 4.5.5) without comparisons and ?:. Two's
// complement, 64 bits.
int64_t parse_constant(TokenStream& tokens);
// The same without binary operators: what may follow `reg+`.
int64_t parse_signed_constant(TokenStream& tokens);

// A module variable or function that an initialiser names.
struct AddressOf {
  bool is_function = false;
  int index = 0;
};

struct InitializerContext {
  std::function<AddressOf(std::string_view name)> resolve;  // throws ParseError
  size_t* budget;  // bytes that initialisers of the module may still take
};

// What follows `=`: fills variable.initial and .relocations. `dimensions` are the array's,
// outermost first; the first may be 0 (`[]`) and is then set from the number of initialisers.
void parse_initializer(TokenStream& tokens, const InitializerContext& context,
                       std::vector<uint64_t>& dimensions, Variable& variable);

}  // namespace gpu_emulator::ptx
