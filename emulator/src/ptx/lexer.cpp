#include "lexer.h"

#include <bit>
#include <charconv>
#include <string>

#include "parser.h"

namespace gpu_emulator::ptx {
namespace {

bool is_alpha(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_word_start(char c) { return is_alpha(c) || c == '_' || c == '$' || c == '%'; }
bool is_word_part(char c) { return is_alpha(c) || is_digit(c) || c == '_' || c == '$'; }
bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> run() {
    std::vector<Token> tokens;
    tokens.reserve(text_.size() / 4 + 1);
    do {
      tokens.push_back(next());
    } while (tokens.back().kind != Token::Kind::kEnd);
    return tokens;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw ParseError("line " + std::to_string(line_) + ": " + what);
  }
  char at(size_t offset) const {
    return position_ + offset < text_.size() ? text_[position_ + offset] : '\0';
  }
  bool done() const { return position_ >= text_.size(); }

  // Spaces, comments and lines that begin with #.
  void skip_blank() {
    while (!done()) {
      const char c = at(0);
      if (c == '\n') ++line_;
      // Texts handed to the driver often carry the terminating zero of a C string.
      if (is_space(c) || c == '\0') {
        ++position_;
      } else if (c == '#' || (c == '/' && at(1) == '/')) {
        while (!done() && at(0) != '\n') ++position_;
      } else if (c == '/' && at(1) == '*') {
        skip_block_comment();
      } else {
        return;
      }
    }
  }

  void skip_block_comment() {
    const size_t end = text_.find("*/", position_ + 2);
    if (end == std::string_view::npos) fail("comment without end");
    for (; position_ < end; ++position_) line_ += text_[position_] == '\n';
    position_ = end + 2;
  }

  Token next() {
    const size_t before = position_;
    skip_blank();
    Token token;
    token.glued = position_ == before;
    token.line = line_;
    if (done()) return token;
    const size_t begin = position_;
    const char c = at(0);
    if (is_word_start(c) && (c != '%' || is_word_part(at(1)))) {
      token.kind = Token::Kind::kWord;
      for (++position_; is_word_part(at(0));) ++position_;
    } else if (c == '.' && is_word_part(at(1))) {
      return dotted(token);
    } else if (is_digit(c)) {
      return number(token);
    } else if (c == '"') {
      return string(token);
    } else {
      token.kind = Token::Kind::kPunctuation;
      position_ += punctuation_length();
    }
    token.text = text_.substr(begin, position_ - begin);
    return token;
  }

  size_t punctuation_length() const {
    static constexpr std::string_view kTwo[] = {"<<", ">>", "<=", ">=", "==", "!=", "&&", "||"};
    const std::string_view two = text_.substr(position_, 2);
    for (std::string_view candidate : kTwo) {
      if (two == candidate) return 2;
    }
    static constexpr std::string_view kOne = "{}[]()<>,;:=+-*/%&|^~!?@";
    if (kOne.find(at(0)) == std::string_view::npos) {
      const bool printable = at(0) > ' ' && at(0) < 127;
      fail(printable ? std::string("unexpected character '") + at(0) + "'"
                     : "unexpected byte " + std::to_string(static_cast<unsigned char>(at(0))));
    }
    return 1;
  }

  Token dotted(Token token) {
    const size_t begin = ++position_;
    while (is_word_part(at(0)) || (at(0) == ':' && at(1) == ':' && is_word_part(at(2)))) {
      position_ += at(0) == ':' ? 2 : 1;
    }
    token.kind = Token::Kind::kDotted;
    token.text = text_.substr(begin, position_ - begin);
    return token;
  }

  Token string(Token token) {
    const size_t begin = ++position_;
    while (!done() && at(0) != '"' && at(0) != '\n') position_ += at(0) == '\\' ? 2 : 1;
    if (at(0) != '"') fail("string without end");
    token.kind = Token::Kind::kString;
    token.text = text_.substr(begin, position_ - begin);
    ++position_;
    return token;
  }

  // 0fXXXXXXXX and 0dXXXXXXXXXXXXXXXX, section 4.5.2.
  bool hex_float(Token& token) {
    const char kind = static_cast<char>(at(1) | 0x20);
    if (at(0) != '0' || (kind != 'f' && kind != 'd')) return false;
    const size_t digits = kind == 'f' ? 8 : 16;
    token.kind = kind == 'f' ? Token::Kind::kFloatBits32 : Token::Kind::kFloatBits64;
    const std::string_view hex = text_.substr(position_ + 2, digits);
    const auto result = std::from_chars(hex.data(), hex.data() + hex.size(), token.value, 16);
    if (hex.size() != digits || result.ptr != hex.data() + digits) fail("bad float constant");
    position_ += 2 + digits;
    return true;
  }

  Token number(Token token) {
    const size_t begin = position_;
    if (!hex_float(token)) {
      size_t end = begin;
      while (end < text_.size() && is_digit(text_[end])) ++end;
      const bool fraction = end < text_.size() && text_[end] == '.' && end + 1 < text_.size() &&
                            is_digit(text_[end + 1]);
      if (fraction) {
        decimal_float(token);
      } else {
        integer(token);
      }
    }
    if (is_word_part(at(0))) fail("bad number");
    token.text = text_.substr(begin, position_ - begin);
    return token;
  }

  void decimal_float(Token& token) {
    double value = 0;
    const char* begin = text_.data() + position_;
    const auto result = std::from_chars(begin, text_.data() + text_.size(), value);
    if (result.ec != std::errc()) fail("bad float constant");
    token.kind = Token::Kind::kFloat;
    token.value = std::bit_cast<uint64_t>(value);
    position_ += static_cast<size_t>(result.ptr - begin);
  }

  void integer(Token& token) {
    int base = 10;
    if (at(0) == '0') {
      const char prefix = static_cast<char>(at(1) | 0x20);
      base = prefix == 'x' ? 16 : prefix == 'b' ? 2 : 8;
      if (base != 8) position_ += 2;
    }
    const char* begin = text_.data() + position_;
    const auto result = std::from_chars(begin, text_.data() + text_.size(), token.value, base);
    if (result.ec != std::errc()) fail("bad integer constant");
    token.kind = Token::Kind::kInteger;
    position_ += static_cast<size_t>(result.ptr - begin);
    if (at(0) == 'U') ++position_;
  }

  std::string_view text_;
  size_t position_ = 0;
  int line_ = 1;
};

}  // namespace

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).run(); }

}  // namespace gpu_emulator::ptx
