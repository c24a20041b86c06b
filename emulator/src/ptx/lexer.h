#pragma once

// Words of a PTX text (PTX ISA 9.0, section 4.2-4.5).

#include <cstdint>
#include <string_view>
#include <vector>

namespace gpu_emulator::ptx {

struct Token {
  enum class Kind : uint8_t {
    kWord,         // identifier, with its leading %, $ or _
    kDotted,       // .name, .shared::cta, .2d: text without the dot
    kInteger,      // value
    kFloat,        // value: bits of an f64; decimal
    kFloatBits32,  // 0fXXXXXXXX: value
    kFloatBits64,  // 0dXXXXXXXXXXXXXXXX: value
    kString,       // text without the quotes, escapes kept
    kPunctuation,  // one character, or << >> <= >= == != && ||
    kEnd,
  };
  Kind kind = Kind::kEnd;
  bool glued = false;  // no space between this token and the one before
  int line = 0;
  uint64_t value = 0;
  std::string_view text;

  bool is(std::string_view punctuation) const {
    return kind == Kind::kPunctuation && text == punctuation;
  }
  bool is_dotted(std::string_view name) const { return kind == Kind::kDotted && text == name; }
};

// All tokens and a last one of kind kEnd; they point into `text`. Throws ParseError.
std::vector<Token> tokenize(std::string_view text);

}  // namespace gpu_emulator::ptx
