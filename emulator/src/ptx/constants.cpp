#include "constants.h"

#include <bit>
#include <cstring>

namespace gpu_emulator::ptx {
namespace {

constexpr int kMaxDepth = 64;  // of parentheses and braces

class ConstantParser {
 public:
  explicit ConstantParser(TokenStream& tokens) : tokens_(tokens) {}

  // Precedence climbing; level 0 takes all operators.
  uint64_t binary(int level, int depth) {
    uint64_t left = unary(depth);
    for (;;) {
      const int precedence = precedence_of(tokens_.peek());
      if (precedence < level) return left;
      const std::string_view op = tokens_.next().text;
      left = apply(op, left, binary(precedence + 1, depth));
    }
  }

  uint64_t unary(int depth) {
    if (depth > kMaxDepth) tokens_.fail("expression nested too deeply");
    if (tokens_.accept("-")) return 0 - unary(depth + 1);
    if (tokens_.accept("+")) return unary(depth + 1);
    if (tokens_.accept("~")) return ~unary(depth + 1);
    if (tokens_.accept("!")) return unary(depth + 1) == 0;
    if (tokens_.accept("(")) {
      const uint64_t value = binary(0, depth + 1);
      tokens_.expect(")");
      return value;
    }
    if (tokens_.peek().kind == Token::Kind::kWord && tokens_.peek().text == "WARP_SZ") {
      tokens_.next();
      return 32;
    }
    if (tokens_.peek().kind != Token::Kind::kInteger) tokens_.fail_expected("an integer constant");
    return tokens_.next().value;
  }

 private:
  static int precedence_of(const Token& token) {
    if (token.kind != Token::Kind::kPunctuation) return -1;
    static constexpr std::string_view kLevels[][3] = {{"|", "", ""},  {"^", "", ""},
                                                      {"&", "", ""},  {"<<", ">>", ""},
                                                      {"+", "-", ""}, {"*", "/", "%"}};
    for (int level = 0; level < static_cast<int>(std::size(kLevels)); ++level) {
      for (std::string_view op : kLevels[level]) {
        if (token.text == op) return level;
      }
    }
    return -1;
  }

  uint64_t apply(std::string_view op, uint64_t a, uint64_t b) const {
    const auto signed_a = static_cast<int64_t>(a), signed_b = static_cast<int64_t>(b);
    switch (op[0]) {
      case '|':
        return a | b;
      case '^':
        return a ^ b;
      case '&':
        return a & b;
      case '<':
        return b < 64 ? a << b : 0;
      case '>':
        return static_cast<uint64_t>(signed_a >> std::min<uint64_t>(b, 63));
      case '+':
        return a + b;
      case '-':
        return a - b;
      case '*':
        return a * b;
      default:
        break;
    }
    if (b == 0) tokens_.fail("division by zero");
    if (signed_b == -1) return op[0] == '/' ? 0 - a : 0;  // the one quotient that overflows
    return static_cast<uint64_t>(op[0] == '/' ? signed_a / signed_b : signed_a % signed_b);
  }

  TokenStream& tokens_;
};

// Fills one variable's bytes.
class InitializerParser {
 public:
  InitializerParser(TokenStream& tokens, const InitializerContext& context, Variable& variable)
      : tokens_(tokens),
        context_(context),
        variable_(variable),
        element_(type_bytes(variable.type)) {}

  void run(std::vector<uint64_t>& dimensions) {
    if (dimensions.empty()) {
      value(0);
      return;
    }
    list(dimensions, 0, 0);
    if (dimensions[0] == 0) dimensions[0] = outermost_count_;
  }

 private:
  // { a, b, ... } of dimension `level`, its first byte at `offset`.
  void list(const std::vector<uint64_t>& dimensions, size_t level, uint64_t offset) {
    uint64_t stride = element_;  // the sizes were checked by the caller: no overflow
    for (size_t i = level + 1; i < dimensions.size(); ++i) stride *= dimensions[i];
    const uint64_t count = dimensions[level];
    tokens_.expect("{");
    uint64_t filled = 0;
    if (!tokens_.accept("}")) {
      do {
        if (count != 0 && filled == count) tokens_.fail("too many initialisers");
        if (level + 1 < dimensions.size() && tokens_.peek().is("{")) {
          list(dimensions, level + 1, offset + filled * stride);
        } else {
          value(offset + filled * stride);
        }
        ++filled;
      } while (tokens_.accept(","));
      tokens_.expect("}");
    }
    if (level == 0) outermost_count_ = filled;
  }

  void value(uint64_t offset) {
    const Token& token = tokens_.peek();
    const bool names_mask = token.kind == Token::Kind::kInteger && tokens_.peek(1).is("(");
    if (names_mask) {
      masked_address(offset);
    } else if (token.kind == Token::Kind::kWord && token.text != "WARP_SZ") {
      store(offset, address(offset), 8);
    } else {
      store(offset, number(), element_);
    }
  }

  uint64_t number() {
    const bool negative = tokens_.peek().is("-");
    const Token& token = tokens_.peek(negative ? 1 : 0);
    const bool is_float = token.kind == Token::Kind::kFloat ||
                          token.kind == Token::Kind::kFloatBits32 ||
                          token.kind == Token::Kind::kFloatBits64;
    if (!is_float) {
      const int64_t integer = parse_constant(tokens_);
      if (variable_.type == Type::kF32) return std::bit_cast<uint32_t>(static_cast<float>(integer));
      if (variable_.type == Type::kF64)
        return std::bit_cast<uint64_t>(static_cast<double>(integer));
      return static_cast<uint64_t>(integer);
    }
    if (negative) tokens_.next();
    const bool is_f32 = token.kind == Token::Kind::kFloatBits32;
    double value = is_f32 ? std::bit_cast<float>(static_cast<uint32_t>(token.value))
                          : std::bit_cast<double>(token.value);
    if (negative) value = -value;
    tokens_.next();
    if (element_ == 4) return std::bit_cast<uint32_t>(static_cast<float>(value));
    if (element_ == 8) return std::bit_cast<uint64_t>(value);
    tokens_.fail("a float initialises a variable that is neither 4 nor 8 bytes wide");
  }

  // name, generic(name), each with + or - a constant. Records the relocation, returns the addend.
  uint64_t address(uint64_t offset) {
    std::string_view name = tokens_.expect_word("a name");
    const bool generic = name == "generic" && tokens_.accept("(");
    if (generic) name = tokens_.expect_word("a name");
    const int line = tokens_.peek().line;
    int64_t addend = signed_addend();
    if (generic) {
      tokens_.expect(")");
      addend += signed_addend();
    }
    if (element_ != 8 && element_ != 1) {
      tokens_.fail_at(line, "an address initialises a variable that is not 8 bytes wide");
    }
    const AddressOf target = context_.resolve(name);
    variable_.relocations.push_back({offset, target.is_function, target.index});
    return static_cast<uint64_t>(addend);
  }

  int64_t signed_addend() {
    uint64_t sum = 0;
    for (;;) {
      if (tokens_.accept("+")) {
        sum += static_cast<uint64_t>(parse_signed_constant(tokens_));
      } else if (tokens_.accept("-")) {
        sum -= static_cast<uint64_t>(parse_signed_constant(tokens_));
      } else {
        return static_cast<int64_t>(sum);
      }
    }
  }

  // 0xFF(name), 0xFF00(name), ...: the bytes of an address in an array of bytes, lowest first. Only
  // whole runs of eight are addresses.
  void masked_address(uint64_t offset) {
    const int byte = std::countr_zero(tokens_.peek().value) / 8;
    if (element_ != 1 || byte > 7 || tokens_.peek().value != uint64_t{0xff} << (8 * byte)) {
      tokens_.fail("expected a mask of one byte");
    }
    tokens_.next();
    tokens_.expect("(");
    const size_t relocations = variable_.relocations.size();
    const uint64_t addend = address(offset - static_cast<uint64_t>(byte));
    tokens_.expect(")");
    const Variable::Relocation target = variable_.relocations.back();
    if (byte == 0) {
      store(offset, addend, 8);
      return;
    }
    variable_.relocations.pop_back();
    if (relocations == 0 || variable_.relocations.back().offset != target.offset ||
        variable_.relocations.back().index != target.index) {
      tokens_.fail("bytes of an address out of order");
    }
  }

  void store(uint64_t offset, uint64_t value, uint64_t bytes) {
    const uint64_t end = offset + bytes;
    if (end > variable_.initial.size()) {
      const uint64_t more = end - variable_.initial.size();
      if (more > *context_.budget) tokens_.fail("initialiser too large");
      *context_.budget -= more;
      variable_.initial.resize(end);
    }
    std::memcpy(variable_.initial.data() + offset, &value, std::min<uint64_t>(bytes, 8));
  }

  TokenStream& tokens_;
  const InitializerContext& context_;
  Variable& variable_;
  uint64_t element_;
  uint64_t outermost_count_ = 0;
};

}  // namespace

int64_t parse_constant(TokenStream& tokens) {
  return static_cast<int64_t>(ConstantParser(tokens).binary(0, 0));
}

int64_t parse_signed_constant(TokenStream& tokens) {
  return static_cast<int64_t>(ConstantParser(tokens).unary(0));
}

void parse_initializer(TokenStream& tokens, const InitializerContext& context,
                       std::vector<uint64_t>& dimensions, Variable& variable) {
  InitializerParser(tokens, context, variable).run(dimensions);
}

}  // namespace gpu_emulator::ptx
