#include "token_stream.h"

namespace gpu_emulator::ptx {
namespace {

constexpr size_t kMaxQuoted = 60;  // characters of the text that an error repeats

}  // namespace

void TokenStream::skip_past(std::string_view punctuation) {
  while (!accept(punctuation)) {
    if (at_end()) fail_expected_punctuation(punctuation);
    next();
  }
}

void TokenStream::skip_block(std::string_view open, std::string_view close) {
  expect(open);
  for (size_t depth = 1; depth > 0; next()) {
    if (at_end()) fail_expected_punctuation(close);
    if (peek().is(open)) ++depth;
    if (peek().is(close)) --depth;
  }
}

void TokenStream::fail(const std::string& what) const { fail_at(peek().line, what); }

void TokenStream::fail_at(int line, const std::string& what) const {
  throw ParseError("line " + std::to_string(line) + ": " + what);
}

void TokenStream::fail_expected(const std::string& what) const {
  std::string found = "the end of the text";
  if (!at_end()) {
    found = peek().kind == Token::Kind::kDotted ? "'." : "'";
    found.append(peek().text.substr(0, kMaxQuoted)).append("'");
  }
  fail("expected " + what + " before " + found);
}

void TokenStream::fail_expected_punctuation(std::string_view punctuation) const {
  std::string quoted = "'";
  fail_expected(quoted.append(punctuation).append("'"));
}

}  // namespace gpu_emulator::ptx
