#pragma once

#include <stdexcept>
#include <string_view>

#include "module.h"

namespace gpu_emulator::ptx {

class ParseError : public std::runtime_error {  // "line 12: expected ';' before '}'"
 public:
  using std::runtime_error::runtime_error;
};

// Parses any PTX text; throws ParseError, and nothing else, whatever the input. Memory use is
// bounded by a multiple of the text's length.
Module parse(std::string_view text);

}  // namespace gpu_emulator::ptx
