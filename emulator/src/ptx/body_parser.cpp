// The body of a function: nested scopes, declarations, labels, instructions.

#include <algorithm>
#include <utility>

#include "constants.h"
#include "declarations.h"
#include "scopes.h"

namespace gpu_emulator::ptx {
namespace {

constexpr int kMaxOperandDepth = 8;

class BodyParser : public VariableSink {
 public:
  BodyParser(TokenStream& tokens, ModuleNames& names, Function& function)
      : tokens_(tokens), names_(names), function_(function), scopes_(tokens, function) {}

  void run() {
    scopes_.open();
    const int outside = scopes_.current();
    declare_parameters(function_.params, Symbol::Kind::kParam);
    declare_parameters(function_.returns, Symbol::Kind::kReturn);
    scopes_.open();
    while (scopes_.current() != outside) statement();
    resolve_names();
  }

  void declare(std::string_view name, Variable variable) override {
    const bool is_module_wide = variable.space == Space::kGlobal || variable.space == Space::kConst;
    auto& list = is_module_wide ? names_.module.variables : function_.variables;
    scopes_.bind(name, {is_module_wide ? Symbol::Kind::kModuleVariable : Symbol::Kind::kVariable,
                        static_cast<int>(list.size())});
    list.push_back(std::move(variable));
  }

 private:
  void declare_parameters(const std::vector<Variable>& list, Symbol::Kind kind) {
    for (size_t i = 0; i < list.size(); ++i) {
      // A `_` is a parameter that nobody names.
      if (list[i].name == "_") continue;
      if (list[i].space == Space::kReg) {
        scopes_.bind_register(list[i].name, list[i].type, 1);
      } else {
        scopes_.bind(list[i].name, {kind, static_cast<int>(i)});
      }
    }
  }

  // ------------------------------------------------------------------------------------ statements

  void statement() {
    const Token& token = tokens_.peek();
    if (tokens_.accept("{")) {
      scopes_.open();
    } else if (tokens_.accept("}")) {
      scopes_.close();
    } else if (token.kind == Token::Kind::kDotted) {
      directive();
    } else if (token.kind == Token::Kind::kWord && tokens_.peek(1).is(":")) {
      label();
    } else if (token.kind == Token::Kind::kWord || token.is("@")) {
      instruction();
    } else if (!tokens_.accept(";")) {
      tokens_.fail_expected("an instruction");
    }
  }

  void directive() {
    const std::string_view word = tokens_.next().text;
    if (word == "reg") {
      registers();
    } else if (const auto space = space_from_name(word)) {
      parse_variables(tokens_, names_, *space, false, *this);
    } else if (word == "loc") {
      location();
    } else if (word == "pragma") {
      tokens_.skip_past(";");
    } else {
      tokens_.fail("unknown directive ." + std::string(word.substr(0, 60)) + " in a function");
    }
  }

  void registers() {
    int lanes = 1;
    std::optional<Type> type;
    while (tokens_.peek().kind == Token::Kind::kDotted) {
      const std::string_view word = tokens_.next().text;
      if (word == "v2" || word == "v4" || word == "v8") {
        lanes = word[1] - '0';
      } else if (word == "align") {
        tokens_.expect_int("an alignment");
      } else if (!(type = type_from_name(word))) {
        tokens_.fail("unknown type ." + std::string(word.substr(0, 60)));
      }
    }
    if (!type) tokens_.fail_expected("a type");
    do {
      const std::string_view name = tokens_.expect_word("the name of a register");
      if (tokens_.accept("<")) {
        const int count = tokens_.expect_int("a number of registers");
        tokens_.expect(">");
        scopes_.add_range({name, static_cast<uint64_t>(count), *type, lanes});
      } else {
        scopes_.bind_register(name, *type, lanes);
      }
    } while (tokens_.accept(","));
    tokens_.expect(";");
  }

  // .loc file line column [, function_name label [+ offset], inlined_at file line column]
  // Line 0 says that what follows belongs to no line: the line before says most about it.
  void location() {
    SourceLocation here;
    // The number as written: .file may come later, parse() turns it to an index.
    here.file = tokens_.expect_int("a file number");
    here.line = tokens_.expect_int("a line number");
    here.column = tokens_.expect_int("a column");
    if (here.line > 0) source_ = here;
    while (tokens_.peek().is(",") && tokens_.peek(1).kind == Token::Kind::kWord) {
      tokens_.next();
      const std::string_view word = tokens_.next().text;
      if (word == "function_name") {
        tokens_.expect_word("a label");
        if (tokens_.accept("+")) tokens_.expect_int("an offset");
      } else if (word == "inlined_at") {
        for (int i = 0; i < 3; ++i) tokens_.expect_int("a number");
      } else {
        tokens_.fail("unknown attribute of .loc");
      }
    }
  }

  void label() {
    const std::string_view name = tokens_.next().text;
    tokens_.expect(":");
    if (tokens_.accept_dotted("branchtargets")) {
      branch_targets(name);
    } else if (tokens_.accept_dotted("callprototype") || tokens_.accept_dotted("calltargets")) {
      scopes_.bind(name, {Symbol::Kind::kName});
      tokens_.skip_past(";");
    } else {
      scopes_.bind(name, {Symbol::Kind::kLabel, static_cast<int>(function_.labels.size())});
      function_.labels.push_back({std::string(name), static_cast<int>(function_.body.size())});
    }
  }

  void branch_targets(std::string_view name) {
    const int index = static_cast<int>(function_.branch_targets.size());
    scopes_.bind(name, {Symbol::Kind::kTargets, index});
    function_.branch_targets.emplace_back();
    do {
      pending_targets_.push_back(
          {index, scopes_.current(), tokens_.peek().line, tokens_.expect_word("a label")});
    } while (tokens_.accept(","));
    tokens_.expect(";");
  }

  void instruction() {
    Instruction instruction;
    instruction.line = tokens_.peek().line;
    instruction.source = source_;
    if (tokens_.accept("@")) {
      instruction.guard_negated = tokens_.accept("!");
      const std::string_view name = tokens_.expect_word("a predicate");
      const Symbol* symbol = scopes_.find(name);
      if (!symbol || symbol->kind != Symbol::Kind::kRegister ||
          function_.registers[symbol->index].type != Type::kPred) {
        tokens_.fail("'" + std::string(name.substr(0, 60)) + "' is not a predicate register");
      }
      instruction.guard = symbol->index;
      instruction.line = tokens_.peek().line;
    }
    instruction.opcode = tokens_.expect_word("an opcode");
    while (tokens_.peek().kind == Token::Kind::kDotted) {
      instruction.modifiers.emplace_back(tokens_.next().text);
    }
    if (tokens_.peek().is("}") || tokens_.at_end()) tokens_.fail_expected("';'");
    if (!tokens_.accept(";")) {
      do {
        instruction.operands.push_back(operand(0));
      } while (tokens_.accept(","));
      tokens_.expect(";");
    }
    function_.body.push_back(std::move(instruction));
  }

  // -------------------------------------------------------------------------------------- operands

  Operand operand(int depth) {
    if (depth > kMaxOperandDepth) tokens_.fail("operand nested too deeply");
    Operand first = primary(depth);
    if (!tokens_.accept("|")) return first;
    Operand pair;
    pair.kind = Operand::Kind::kPair;
    pair.elements.push_back(std::move(first));
    pair.elements.push_back(primary(depth));
    return pair;
  }

  Operand primary(int depth) {
    const Token& token = tokens_.peek();
    if (token.is("{")) return list("{", "}", depth);
    if (token.is("(")) return list("(", ")", depth);
    if (token.is("[")) return memory(depth);
    const bool sign = token.is("!") || token.is("-");
    if (sign && tokens_.peek(1).kind == Token::Kind::kWord && tokens_.peek(1).text != "WARP_SZ") {
      tokens_.next();
      Operand result = named(false);
      result.negated = true;
      return result;
    }
    if (token.kind == Token::Kind::kWord && token.text != "WARP_SZ") return named(true);
    return immediate();
  }

  Operand list(const char* open, const char* close, int depth) {
    Operand result;
    result.kind = Operand::Kind::kVector;
    tokens_.expect(open);
    if (tokens_.accept(close)) return result;
    do {
      result.elements.push_back(operand(depth + 1));
    } while (tokens_.accept(","));
    tokens_.expect(close);
    return result;
  }

  // [base + offset, more...]
  Operand memory(int depth) {
    Operand result;
    result.kind = Operand::Kind::kMemory;
    tokens_.expect("[");
    Operand base = tokens_.peek().kind == Token::Kind::kWord ? named(true) : immediate();
    if (base.kind == Operand::Kind::kVariable || base.kind == Operand::Kind::kName) {
      std::swap(base.value, result.value);
    } else {
      result.value = offset();
    }
    result.elements.push_back(std::move(base));
    while (tokens_.accept(",")) result.elements.push_back(operand(depth + 1));
    tokens_.expect("]");
    return result;
  }

  int64_t offset() {
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

  Operand immediate() {
    Operand result;
    result.kind = Operand::Kind::kImmediate;
    const bool negative = tokens_.peek().is("-");
    const Token& token = tokens_.peek(negative ? 1 : 0);
    result.is_f32 = token.kind == Token::Kind::kFloatBits32;
    result.is_float = result.is_f32 || token.kind == Token::Kind::kFloat ||
                      token.kind == Token::Kind::kFloatBits64;
    if (!result.is_float) {
      const bool begins_constant = tokens_.peek().kind == Token::Kind::kInteger ||
                                   tokens_.peek().kind == Token::Kind::kWord ||
                                   tokens_.peek().is("-") || tokens_.peek().is("+") ||
                                   tokens_.peek().is("~") || tokens_.peek().is("!");
      if (!begins_constant) tokens_.fail_expected("an operand");
      result.value = parse_constant(tokens_);
      return result;
    }
    const uint64_t sign = negative ? uint64_t{1} << (result.is_f32 ? 31 : 63) : 0;
    result.value = static_cast<int64_t>(token.value ^ sign);
    if (negative) tokens_.next();
    tokens_.next();
    return result;
  }

  // A register, special register, variable (with an offset where `may_offset`), or a name that is
  // looked up when the whole body has been read.
  Operand named(bool may_offset) {
    const std::string_view name = tokens_.next().text;
    Operand result;
    if (name == "_") return result;
    if (const Symbol* symbol = scopes_.find(name)) {
      fill(result, *symbol, name);
    } else if (const auto it = names_.variables.find(name); it != names_.variables.end()) {
      result.kind = Operand::Kind::kVariable;
      result.index = it->second;
    } else if (name[0] == '%') {
      result.kind = Operand::Kind::kSpecial;
      result.name = name;
      if (tokens_.peek().kind == Token::Kind::kDotted && tokens_.peek().glued) {
        result.name += "." + std::string(tokens_.next().text);
      }
      if (!is_special_register(result.name)) {
        tokens_.fail("unknown register '" + result.name.substr(0, 60) + "'");
      }
    } else {
      result.kind = Operand::Kind::kName;
      result.name = name;
      result.index = scopes_.current();
    }
    const bool is_address =
        result.kind == Operand::Kind::kVariable || result.kind == Operand::Kind::kName;
    if (is_address && may_offset) result.value = offset();
    return result;
  }

  void fill(Operand& result, const Symbol& symbol, std::string_view name) {
    result.index = symbol.index;
    switch (symbol.kind) {
      case Symbol::Kind::kRegister:
        fill_register(result, symbol);
        return;
      case Symbol::Kind::kVariable:
      case Symbol::Kind::kModuleVariable:
      case Symbol::Kind::kParam:
      case Symbol::Kind::kReturn:
        result.kind = Operand::Kind::kVariable;
        result.variable_scope = symbol.kind == Symbol::Kind::kVariable ? Operand::Scope::kFunction
                                : symbol.kind == Symbol::Kind::kParam  ? Operand::Scope::kParam
                                : symbol.kind == Symbol::Kind::kReturn ? Operand::Scope::kReturn
                                                                       : Operand::Scope::kModule;
        return;
      case Symbol::Kind::kLabel:
        result.kind = Operand::Kind::kLabel;
        return;
      case Symbol::Kind::kTargets:
        result.kind = Operand::Kind::kBranchTargets;
        return;
      case Symbol::Kind::kName:
        result.kind = Operand::Kind::kName;
        result.index = -1;
        result.name = name;
        return;
    }
  }

  // %r, %v.x of a vector register, or %v as a whole.
  void fill_register(Operand& result, const Symbol& symbol) {
    result.kind = Operand::Kind::kRegister;
    if (tokens_.peek().kind == Token::Kind::kDotted && tokens_.peek().glued) {
      static constexpr std::string_view kComponents[] = {"xyzw", "rgba"};
      const std::string_view word = tokens_.next().text;
      size_t lane = std::string_view::npos;
      for (std::string_view components : kComponents) {
        if (word.size() == 1) lane = std::min(lane, components.find(word[0]));
      }
      if (lane >= static_cast<size_t>(symbol.lanes) || symbol.lanes == 1) {
        tokens_.fail("no such component of a register: ." + std::string(word.substr(0, 60)));
      }
      result.index += static_cast<int>(lane);
    } else if (symbol.lanes > 1) {
      result.kind = Operand::Kind::kVector;
      result.index = -1;
      for (int lane = 0; lane < symbol.lanes; ++lane) {
        Operand element;
        element.kind = Operand::Kind::kRegister;
        element.index = symbol.index + lane;
        result.elements.push_back(element);
      }
    }
  }

  // -------------------------------------------------------- names that may come before their label

  void resolve_names() {
    for (Instruction& instruction : function_.body) {
      for (Operand& operand : instruction.operands) resolve(operand, instruction.line);
    }
    for (const PendingTarget& target : pending_targets_) {
      const Symbol* symbol = scopes_.find_declared(target.label, target.scope);
      if (!symbol || symbol->kind != Symbol::Kind::kLabel) unknown(target.line, target.label);
      function_.branch_targets[target.table].push_back(symbol->index);
    }
  }

  void resolve(Operand& operand, int line) {
    for (Operand& element : operand.elements) resolve(element, line);
    if (operand.kind != Operand::Kind::kName || operand.index < 0) return;
    const int scope = std::exchange(operand.index, -1);
    const std::string name = std::move(operand.name);
    operand.name.clear();
    if (const Symbol* symbol = scopes_.find_declared(name, scope)) {
      const bool is_register = symbol->kind == Symbol::Kind::kRegister;
      if (is_register)
        tokens_.fail_at(line, "'" + name.substr(0, 60) + "' is used before its declaration");
      fill(operand, *symbol, name);
    } else if (const auto it = names_.functions.find(name); it != names_.functions.end()) {
      operand.kind = Operand::Kind::kFunction;
      operand.index = it->second;
    } else {
      unknown(line, name);
    }
  }

  [[noreturn]] void unknown(int line, std::string_view name) const {
    tokens_.fail_at(line, "unknown name '" + std::string(name.substr(0, 60)) + "'");
  }

  struct PendingTarget {
    int table, scope, line;
    std::string_view label;
  };

  TokenStream& tokens_;
  ModuleNames& names_;
  Function& function_;
  Scopes scopes_;
  std::vector<PendingTarget> pending_targets_;
  SourceLocation source_;
};

}  // namespace

void parse_body(TokenStream& tokens, ModuleNames& names, Function& function) {
  BodyParser(tokens, names, function).run();
}

}  // namespace gpu_emulator::ptx
