#include "parser.h"

#include <algorithm>
#include <unordered_map>

#include "declarations.h"

namespace gpu_emulator::ptx {
namespace {

class ModuleParser : public VariableSink {
 public:
  explicit ModuleParser(std::string_view text) : tokens_(text) {
    names_.module.source = text;
    names_.module.files.emplace_back();
    names_.initializer_budget = (size_t{1} << 20) + 64 * text.size();
  }

  Module run() {
    while (!tokens_.at_end()) statement();
    if (module().version_major == 0) tokens_.fail("no .version directive");
    if (module().target.empty()) tokens_.fail("no .target directive");
    map_files();
    apply_aliases();
    return std::move(names_.module);
  }

  // A second declaration of a name completes an .extern one.
  void declare(std::string_view name, Variable variable) override {
    const auto [it, is_new] =
        names_.variables.emplace(name, static_cast<int>(module().variables.size()));
    if (is_new) {
      module().variables.push_back(std::move(variable));
      return;
    }
    Variable& known = module().variables[it->second];
    if (!known.is_extern && !variable.is_extern) {
      tokens_.fail("'" + known.name.substr(0, 60) + "' is declared twice");
    }
    if (known.is_extern) known = std::move(variable);
  }

 private:
  Module& module() { return names_.module; }

  void statement() {
    if (tokens_.accept(";")) return;
    if (tokens_.accept("@")) {  // @@dwarf: debug information of old compilers, one line
      const int line = tokens_.peek().line;
      while (!tokens_.at_end() && tokens_.peek().line == line) tokens_.next();
      return;
    }
    const std::string_view word = tokens_.expect_dotted("a directive");
    if (word == "version") {
      version();
    } else if (word == "target") {
      target();
    } else if (word == "address_size") {
      if (tokens_.expect_int("an address size") != 64) tokens_.fail("only 64-bit PTX is supported");
    } else if (word == "file") {
      file();
    } else if (word == "section") {
      tokens_.expect_dotted("the name of a section");
      tokens_.skip_block("{", "}");
    } else if (word == "pragma") {
      tokens_.skip_past(";");
    } else if (word == "alias") {
      alias();
    } else {
      declaration(word);
    }
  }

  void version() {
    const Token& token = tokens_.next();
    const size_t dot = token.text.find('.');
    const bool is_number = token.kind == Token::Kind::kFloat && dot != std::string_view::npos &&
                           token.text.size() <= 6;
    if (!is_number) tokens_.fail_at(token.line, "expected a version such as 9.0");
    module().version_major = std::atoi(std::string(token.text.substr(0, dot)).c_str());
    module().version_minor = std::atoi(std::string(token.text.substr(dot + 1)).c_str());
  }

  void target() {
    module().target = tokens_.expect_word("an architecture");
    while (tokens_.accept(",")) tokens_.expect_word("a target option");
  }

  // .file number "name" [, timestamp, size]
  void file() {
    const int number = tokens_.expect_int("a file number");
    if (tokens_.peek().kind != Token::Kind::kString) tokens_.fail_expected("a file name");
    if (file_index_.emplace(number, static_cast<int>(module().files.size())).second) {
      module().files.emplace_back(tokens_.peek().text);
    }
    tokens_.next();
    while (tokens_.accept(",")) tokens_.expect_int("a number");
  }

  void alias() {
    const int function = known_function(tokens_.expect_word("a function"));
    tokens_.expect(",");
    names_.aliases.emplace_back(function, known_function(tokens_.expect_word("a function")));
    tokens_.expect(";");
  }

  int known_function(std::string_view name) {
    const auto it = names_.functions.find(name);
    if (it == names_.functions.end()) {
      tokens_.fail("unknown function '" + std::string(name.substr(0, 60)) + "'");
    }
    return it->second;
  }

  void declaration(std::string_view word) {
    bool is_extern = false;
    while (word == "extern" || word == "visible" || word == "weak" || word == "common") {
      is_extern = is_extern || word == "extern";
      word = tokens_.expect_dotted("a declaration");
    }
    if (word == "entry" || word == "func") {
      function(word == "entry");
    } else if (word == "tex") {  // old form of .global .texref
      parse_variables(tokens_, names_, Space::kGlobal, is_extern, *this);
    } else if (const auto space = space_from_name(word);
               space && *space != Space::kReg && *space != Space::kParam) {
      parse_variables(tokens_, names_, *space, is_extern, *this);
    } else {
      tokens_.fail("unknown directive ." + std::string(word.substr(0, 60)));
    }
  }

  void function(bool is_entry) {
    Function parsed;
    parsed.is_entry = is_entry;
    if (tokens_.accept_dotted("attribute")) tokens_.skip_block("(", ")");
    if (!is_entry && tokens_.peek().is("(")) parsed.returns = parse_parameters(tokens_);
    const std::string_view name = tokens_.expect_word("the name of a function");
    parsed.name = name;
    if (tokens_.peek().is("(")) parsed.params = parse_parameters(tokens_);
    while (tokens_.peek().kind == Token::Kind::kDotted) performance_directive(parsed);
    parsed.has_body = !tokens_.peek().is(";");

    const auto [it, is_new] =
        names_.functions.emplace(name, static_cast<int>(module().functions.size()));
    if (is_new) {
      module().functions.emplace_back();
    } else if (module().functions[it->second].has_body && parsed.has_body) {
      tokens_.fail("function '" + parsed.name.substr(0, 60) + "' has two bodies");
    } else if (module().functions[it->second].is_entry != is_entry) {
      tokens_.fail("'" + parsed.name.substr(0, 60) + "' is both an entry and a function");
    }
    Function& known = module().functions[it->second];
    if (known.has_body) {
      tokens_.expect(";");
      return;
    }
    known = std::move(parsed);
    if (!known.has_body) {
      tokens_.expect(";");
      return;
    }
    tokens_.expect("{");
    parse_body(tokens_, names_, known);
  }

  // PTX ISA 9.0, sections 11.4 and 11.7.
  void performance_directive(Function& function) {
    const std::string_view word = tokens_.next().text;
    if (word == "maxntid") {
      dimensions(function.max_threads);
    } else if (word == "reqntid") {
      dimensions(function.required_threads);
    } else if (word == "reqnctapercluster") {
      dimensions(function.cluster);
    } else if (word == "minnctapersm") {
      function.min_ctas_per_sm = tokens_.expect_int("a number of CTAs");
    } else if (word == "maxnreg") {
      function.max_registers = tokens_.expect_int("a number of registers");
    } else if (word == "explicitcluster") {
      function.explicit_cluster = true;
    } else if (word == "maxnctapersm" || word == "maxclusterrank" || word == "abi_preserve" ||
               word == "abi_preserve_control") {
      tokens_.expect_int("a number");
    } else if (word == "pragma") {
      tokens_.skip_past(";");
    } else if (word == "attribute" || word == "unified") {
      tokens_.skip_block("(", ")");
    } else if (word != "noreturn" && word != "blocksareclusters") {
      tokens_.fail("unknown directive ." + std::string(word.substr(0, 60)));
    }
  }

  // x[, y[, z]]; those not given are 1.
  void dimensions(int (&result)[3]) {
    std::fill(std::begin(result), std::end(result), 1);
    result[0] = tokens_.expect_int("a size");
    for (int i = 1; i < 3 && tokens_.accept(","); ++i) result[i] = tokens_.expect_int("a size");
  }

  void map_files() {
    for (Function& function : module().functions) {
      for (Instruction& instruction : function.body) {
        const auto it = file_index_.find(instruction.source.file);
        if (it == file_index_.end()) {
          instruction.source = {};
        } else {
          instruction.source.file = it->second;
        }
      }
    }
  }

  void apply_aliases() {
    if (names_.aliases.empty()) return;
    std::unordered_map<int, int> target(names_.aliases.begin(), names_.aliases.end());
    for (Function& function : module().functions) {
      for (Instruction& instruction : function.body) {
        for (Operand& operand : instruction.operands) {
          const auto it = target.find(operand.index);
          if (operand.kind == Operand::Kind::kFunction && it != target.end()) {
            operand.index = it->second;
          }
        }
      }
    }
    for (Variable& variable : module().variables) {
      for (Variable::Relocation& relocation : variable.relocations) {
        const auto it = target.find(relocation.index);
        if (relocation.is_function && it != target.end()) relocation.index = it->second;
      }
    }
  }

  TokenStream tokens_;
  ModuleNames names_;
  std::unordered_map<int, int> file_index_;  // of the numbers that .file and .loc use
};

}  // namespace

Module parse(std::string_view text) { return ModuleParser(text).run(); }

}  // namespace gpu_emulator::ptx
