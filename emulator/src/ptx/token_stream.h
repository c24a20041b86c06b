#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "lexer.h"
#include "parser.h"

namespace gpu_emulator::ptx {

// A cursor over tokens with the checks that every production needs. Throws ParseError.
class TokenStream {
 public:
  explicit TokenStream(std::string_view text) : tokens_(tokenize(text)) {}

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(position_ + ahead, tokens_.size() - 1)];
  }
  const Token& next() {
    const Token& token = peek();
    if (position_ + 1 < tokens_.size()) ++position_;
    return token;
  }
  bool at_end() const { return peek().kind == Token::Kind::kEnd; }

  bool accept(std::string_view punctuation) {
    if (!peek().is(punctuation)) return false;
    next();
    return true;
  }
  bool accept_dotted(std::string_view name) {
    if (!peek().is_dotted(name)) return false;
    next();
    return true;
  }
  void expect(std::string_view punctuation) {
    if (!accept(punctuation)) fail_expected_punctuation(punctuation);
  }
  std::string_view expect_word(const char* what) {
    if (peek().kind != Token::Kind::kWord) fail_expected(what);
    return next().text;
  }
  std::string_view expect_dotted(const char* what) {
    if (peek().kind != Token::Kind::kDotted) fail_expected(what);
    return next().text;
  }
  // A plain integer constant that fits an int, as directives take it.
  int expect_int(const char* what) {
    const Token& token = peek();
    if (token.kind != Token::Kind::kInteger ||
        token.value > static_cast<uint64_t>(std::numeric_limits<int>::max())) {
      fail_expected(what);
    }
    return static_cast<int>(next().value);
  }
  // Up to and with the next `punctuation`.
  void skip_past(std::string_view punctuation);
  // A balanced block, the cursor before its opening brace.
  void skip_block(std::string_view open, std::string_view close);

  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_at(int line, const std::string& what) const;
  [[noreturn]] void fail_expected(const std::string& what) const;
  [[noreturn]] void fail_expected_punctuation(std::string_view punctuation) const;

 private:
  std::vector<Token> tokens_;
  size_t position_ = 0;
};

}  // namespace gpu_emulator::ptx
