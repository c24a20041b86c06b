#include "declarations.h"

#include <algorithm>
#include <bit>

#include "constants.h"

namespace gpu_emulator::ptx {
namespace {

constexpr uint64_t kMaxVariableBytes = uint64_t{1} << 40;
constexpr size_t kMaxDimensions = 16;

constexpr std::pair<std::string_view, Type> kTypes[] = {
    {"pred", Type::kPred},
    {"b8", Type::kB8},
    {"b16", Type::kB16},
    {"b32", Type::kB32},
    {"b64", Type::kB64},
    {"b128", Type::kB128},
    {"u8", Type::kU8},
    {"u16", Type::kU16},
    {"u32", Type::kU32},
    {"u64", Type::kU64},
    {"s8", Type::kS8},
    {"s16", Type::kS16},
    {"s32", Type::kS32},
    {"s64", Type::kS64},
    {"f16", Type::kF16},
    {"f16x2", Type::kF16x2},
    {"bf16", Type::kBf16},
    {"bf16x2", Type::kBf16x2},
    {"f32", Type::kF32},
    {"f32x2", Type::kF32x2},
    {"f64", Type::kF64},
    // Opaque types (section 5.3) are addresses of 8 bytes.
    {"texref", Type::kB64},
    {"samplerref", Type::kB64},
    {"surfref", Type::kB64},
};

constexpr std::pair<std::string_view, Space> kSpaces[] = {
    {"reg", Space::kReg},     {"const", Space::kConst}, {"global", Space::kGlobal},
    {"local", Space::kLocal}, {"param", Space::kParam}, {"shared", Space::kShared},
};

// Special registers, PTX ISA 9.0 section 10; those of three components first.
constexpr std::string_view kVectorSpecials[] = {
    "%tid",       "%ntid",       "%ctaid",         "%nctaid",
    "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid",
};
constexpr std::string_view kSpecials[] = {
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%gridid",
    "%is_explicit_cluster",
    "%cluster_ctarank",
    "%cluster_nctarank",
    "%lanemask_eq",
    "%lanemask_le",
    "%lanemask_lt",
    "%lanemask_ge",
    "%lanemask_gt",
    "%clock",
    "%clock_hi",
    "%clock64",
    "%globaltimer",
    "%globaltimer_lo",
    "%globaltimer_hi",
    "%reserved_smem_offset_begin",
    "%reserved_smem_offset_end",
    "%reserved_smem_offset_cap",
    "%reserved_smem_offset_0",
    "%reserved_smem_offset_1",
    "%total_smem_size",
    "%aggr_smem_size",
    "%dynamic_smem_size",
    "%current_graph_exec",
};

bool is_numbered(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix) || name.size() == prefix.size()) return false;
  name.remove_prefix(prefix.size());
  return name.size() <= 2 &&
         std::all_of(name.begin(), name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

struct Declaration {
  Type type = Type::kNone;
  uint64_t alignment = 0;  // 0: natural
  uint64_t lanes = 1;
};

// Everything between the state space and the name.
Declaration parse_attributes(TokenStream& tokens) {
  Declaration result;
  while (tokens.peek().kind == Token::Kind::kDotted) {
    const std::string_view word = tokens.next().text;
    if (word == "align") {
      result.alignment = static_cast<uint64_t>(tokens.expect_int("an alignment"));
      if (!std::has_single_bit(result.alignment)) tokens.fail("alignment is not a power of two");
    } else if (word == "v2" || word == "v4" || word == "v8") {
      result.lanes = static_cast<uint64_t>(word[1] - '0');
    } else if (word == "attribute") {
      tokens.skip_block("(", ")");
    } else if (word == "ptr") {  // of a kernel parameter, section 5.1.6.1: what it points to
      if (tokens.peek().kind == Token::Kind::kDotted && space_from_name(tokens.peek().text)) {
        tokens.next();
      }
      if (tokens.accept_dotted("align")) tokens.expect_int("an alignment");
    } else if (const auto type = type_from_name(word)) {
      result.type = *type;
    } else {
      tokens.fail("unknown attribute ." + std::string(word.substr(0, 60)) + " in a declaration");
    }
  }
  if (type_bytes(result.type) == 0) tokens.fail_expected("a type that has a size");
  return result;
}

std::vector<uint64_t> parse_dimensions(TokenStream& tokens) {
  std::vector<uint64_t> dimensions;
  while (tokens.accept("[")) {
    uint64_t size = 0;
    if (!tokens.peek().is("]")) {
      const int64_t constant = parse_constant(tokens);
      if (constant < 0) tokens.fail("negative array size");
      size = static_cast<uint64_t>(constant);
    } else if (!dimensions.empty()) {
      tokens.fail("only the first dimension may be left open");
    }
    tokens.expect("]");
    if (dimensions.size() == kMaxDimensions) tokens.fail("too many dimensions");
    dimensions.push_back(size);
  }
  return dimensions;
}

uint64_t checked_bytes(const TokenStream& tokens, uint64_t element,
                       const std::vector<uint64_t>& dimensions) {
  uint64_t bytes = element;
  for (uint64_t size : dimensions) {
    if (size > kMaxVariableBytes || (bytes *= size) > kMaxVariableBytes) {
      tokens.fail("variable too large");
    }
  }
  return bytes;
}

AddressOf resolve_address(const TokenStream& tokens, const ModuleNames& names,
                          std::string_view name) {
  if (const auto it = names.variables.find(name); it != names.variables.end()) {
    return {false, it->second};
  }
  if (const auto it = names.functions.find(name); it != names.functions.end()) {
    return {true, it->second};
  }
  tokens.fail("unknown name '" + std::string(name.substr(0, 60)) + "'");
}

Variable make_variable(std::string_view name, Space space, const Declaration& declaration) {
  Variable variable;
  variable.name = name;
  variable.space = space;
  variable.type = declaration.type;
  const uint64_t natural = type_bytes(declaration.type) * declaration.lanes;
  variable.alignment =
      static_cast<uint32_t>(declaration.alignment ? declaration.alignment : natural);
  return variable;
}

}  // namespace

std::optional<Type> type_from_name(std::string_view name) {
  for (const auto& [known, type] : kTypes) {
    if (name == known) return type;
  }
  return std::nullopt;
}

std::optional<Space> space_from_name(std::string_view name) {
  if (name.starts_with("shared::")) return Space::kShared;
  if (name.starts_with("param::")) return Space::kParam;
  for (const auto& [known, space] : kSpaces) {
    if (name == known) return space;
  }
  return std::nullopt;
}

bool is_special_register(std::string_view name) {
  if (std::find(std::begin(kSpecials), std::end(kSpecials), name) != std::end(kSpecials)) {
    return true;
  }
  if (name.size() > 2 && name[name.size() - 2] == '.' &&
      std::string_view("xyzw").find(name.back()) != std::string_view::npos) {
    name.remove_suffix(2);
    return std::find(std::begin(kVectorSpecials), std::end(kVectorSpecials), name) !=
           std::end(kVectorSpecials);
  }
  return is_numbered(name, "%pm") || is_numbered(name, "%envreg");
}

void parse_variables(TokenStream& tokens, ModuleNames& names, Space space, bool is_extern,
                     VariableSink& sink) {
  const Declaration declaration = parse_attributes(tokens);
  const uint64_t element = type_bytes(declaration.type) * declaration.lanes;
  const InitializerContext context = {
      [&](std::string_view name) { return resolve_address(tokens, names, name); },
      &names.initializer_budget};
  do {
    const std::string_view name = tokens.expect_word("the name of a variable");
    Variable variable = make_variable(name, space, declaration);
    variable.is_extern = is_extern;
    std::vector<uint64_t> dimensions = parse_dimensions(tokens);
    const bool open = !dimensions.empty() && dimensions[0] == 0;
    variable.bytes = checked_bytes(tokens, element, dimensions);
    if (tokens.accept("=")) {
      if (declaration.lanes > 1) dimensions.push_back(declaration.lanes);
      std::vector<uint64_t> rows(dimensions.begin() + (open ? 1 : 0), dimensions.end());
      checked_bytes(tokens, type_bytes(declaration.type), rows);
      parse_initializer(tokens, context, dimensions, variable);
      variable.bytes = checked_bytes(tokens, type_bytes(declaration.type), dimensions);
      if (variable.initial.size() > variable.bytes) tokens.fail("initialiser too long");
    } else if (open && !is_extern && space != Space::kShared) {
      tokens.fail("array without a size: '" + variable.name + "'");
    }
    sink.declare(name, std::move(variable));
  } while (tokens.accept(","));
  tokens.expect(";");
}

std::vector<Variable> parse_parameters(TokenStream& tokens) {
  std::vector<Variable> result;
  tokens.expect("(");
  if (tokens.accept(")")) return result;
  do {
    const auto space = space_from_name(tokens.expect_dotted("'.param' or '.reg'"));
    if (space != Space::kParam && space != Space::kReg) tokens.fail("expected .param or .reg");
    const bool is_predicate = space == Space::kReg && tokens.accept_dotted("pred");
    const Declaration declaration =
        is_predicate ? Declaration{Type::kPred, 1, 1} : parse_attributes(tokens);
    const std::string_view name = tokens.expect_word("the name of a parameter");
    Variable variable = make_variable(name, *space, declaration);
    const uint64_t element = type_bytes(declaration.type) * declaration.lanes;
    variable.bytes = checked_bytes(tokens, element, parse_dimensions(tokens));
    result.push_back(std::move(variable));
  } while (tokens.accept(","));
  tokens.expect(")");
  return result;
}

}  // namespace gpu_emulator::ptx
