// The layout of a module's variables, and the decoding of its functions.

#include "decode.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "function_decoder.h"
#include "memory.h"

namespace gpu_emulator::exec {
namespace {

uint64_t aligned(uint64_t value, uint64_t alignment) {
  if (alignment == 0) alignment = 1;
  return (value + alignment - 1) / alignment * alignment;
}

void layout_module_variables(const ptx::Module& module, Program& program) {
  for (const ptx::Variable& variable : module.variables) {
    program.variable_names.push_back(variable.name);
    program.variable_bytes.push_back(variable.bytes);
    const bool in_image =
        variable.space == ptx::Space::kGlobal || variable.space == ptx::Space::kConst;
    if (!in_image || variable.is_extern) {
      program.variable_offsets.push_back(-1);
      continue;
    }
    const uint64_t offset = aligned(program.module_bytes, variable.alignment);
    program.variable_offsets.push_back(static_cast<int64_t>(offset));
    program.module_bytes = offset + variable.bytes;
  }
  program.initial_image.resize(program.module_bytes);
  for (size_t i = 0; i < module.variables.size(); ++i) {
    const ptx::Variable& variable = module.variables[i];
    const int64_t offset = program.variable_offsets[i];
    if (offset < 0) continue;
    const size_t given = std::min<size_t>(variable.initial.size(), variable.bytes);
    if (given) std::memcpy(program.initial_image.data() + offset, variable.initial.data(), given);
    for (const auto& relocation : variable.relocations) {
      const int64_t value = relocation.is_function
                                ? static_cast<int64_t>(kFunctionWindow | relocation.index)
                                : program.variable_offsets.at(relocation.index);
      program.relocations.push_back({offset + relocation.offset, value, relocation.is_function});
    }
  }
}

void collect_shared_variables(const ptx::Module& module, Program& program) {
  auto collect = [&](const std::vector<ptx::Variable>& variables, int function) {
    for (size_t i = 0; i < variables.size(); ++i) {
      const ptx::Variable& variable = variables[i];
      if (variable.space != ptx::Space::kShared) continue;
      const bool dynamic = variable.bytes == 0;
      program.shared_variables.push_back({function, static_cast<int>(i), variable.bytes,
                                          std::max<uint32_t>(variable.alignment, 1), dynamic});
    }
  };
  collect(module.variables, -1);
  for (size_t f = 0; f < module.functions.size(); ++f) {
    collect(module.functions[f].variables, static_cast<int>(f));
  }
}

// Functions and shared module variables named in an operand.
struct Uses {
  std::set<int> functions, variables;

  void add(const ptx::Operand& operand) {
    if (operand.kind == ptx::Operand::Kind::kFunction) functions.insert(operand.index);
    if (operand.kind == ptx::Operand::Kind::kVariable &&
        operand.variable_scope == ptx::Operand::Scope::kModule) {
      variables.insert(operand.index);
    }
    for (const ptx::Operand& element : operand.elements) add(element);
  }
};

// Shared memory of an entry: the variables that it and its callees name, dynamic ones at the end.
void layout_shared(const ptx::Module& module, const Program& program, int entry, Function& out) {
  std::set<int> seen, variables;
  std::vector<int> work = {entry};
  while (!work.empty()) {
    const int index = work.back();
    work.pop_back();
    if (!seen.insert(index).second) continue;
    Uses uses;
    for (const ptx::Instruction& instruction : module.functions[index].body) {
      for (const ptx::Operand& operand : instruction.operands) uses.add(operand);
    }
    work.insert(work.end(), uses.functions.begin(), uses.functions.end());
    variables.insert(uses.variables.begin(), uses.variables.end());
  }
  out.shared_offsets.assign(program.shared_variables.size(), -1);
  auto used = [&](const Program::SharedVariable& variable) {
    return variable.function < 0 ? variables.count(variable.variable) > 0
                                 : seen.count(variable.function) > 0;
  };
  uint64_t end = 0;
  uint64_t dynamic_alignment = 1;
  for (size_t i = 0; i < program.shared_variables.size(); ++i) {
    const auto& variable = program.shared_variables[i];
    if (!used(variable)) continue;
    if (variable.dynamic) {
      dynamic_alignment = std::max<uint64_t>(dynamic_alignment, variable.alignment);
      continue;
    }
    out.shared_offsets[i] = static_cast<int64_t>(aligned(end, variable.alignment));
    end = out.shared_offsets[i] + variable.bytes;
  }
  end = aligned(end, dynamic_alignment);
  for (size_t i = 0; i < program.shared_variables.size(); ++i) {
    const auto& variable = program.shared_variables[i];
    if (variable.dynamic && used(variable)) out.shared_offsets[i] = static_cast<int64_t>(end);
  }
  out.shared_bytes = static_cast<uint32_t>(end);
}

void copy_attributes(const ptx::Function& ast, Function& out) {
  out.name = ast.name;
  out.is_entry = ast.is_entry;
  out.has_body = ast.has_body;
  out.min_ctas_per_sm = ast.min_ctas_per_sm;
  out.max_registers = ast.max_registers;
  out.explicit_cluster = ast.explicit_cluster;
  for (int i = 0; i < 3; ++i) {
    out.max_threads[i] = ast.max_threads[i];
    out.required_threads[i] = ast.required_threads[i];
    out.cluster[i] = ast.cluster[i];
  }
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

// The pool is 64-byte aligned in an allocation of its own, which the program keeps.
void seal_constants(Program& program, Function& function) {
  constexpr size_t kAlignment = 64;
  program.pools.push_back(std::make_unique<std::byte[]>(function.constants.size() + kAlignment));
  auto address = reinterpret_cast<uintptr_t>(program.pools.back().get());
  address = aligned(address, kAlignment);
  auto* pool = reinterpret_cast<std::byte*>(address);
  std::copy(function.constants.begin(), function.constants.end(), pool);
  function.constant_pool = pool;
  function.constants.clear();
  function.constants.shrink_to_fit();
}

}  // namespace

std::vector<std::byte> Program::image(uint64_t module_base) const {
  std::vector<std::byte> bytes = initial_image;
  for (const Relocation& relocation : relocations) {
    if (relocation.offset + 8 > bytes.size()) continue;
    uint64_t value;
    std::memcpy(&value, bytes.data() + relocation.offset, 8);
    value += static_cast<uint64_t>(relocation.value) + (relocation.is_function ? 0 : module_base);
    std::memcpy(bytes.data() + relocation.offset, &value, 8);
  }
  return bytes;
}

int Program::find_function(const std::string& name) const {
  for (size_t i = 0; i < functions.size(); ++i) {
    if (functions[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

std::unique_ptr<Program> decode(const ptx::Module& module, const Isa* isa) {
  auto program = std::make_unique<Program>();
  program->files = module.files;
  program->target = module.target;
  program->isa = isa ? isa : &best_isa();
  program->source_lines = std::make_shared<const SourceLines>(lines_of(module.source));
  layout_module_variables(module, *program);
  collect_shared_variables(module, *program);
  program->functions.resize(module.functions.size());
  for (size_t i = 0; i < module.functions.size(); ++i) {
    Function& function = program->functions[i];
    copy_attributes(module.functions[i], function);
    FunctionDecoder(module, static_cast<int>(i), *program, function).run(*program->isa);
    seal_constants(*program, function);
    if (function.is_entry) layout_shared(module, *program, static_cast<int>(i), function);
  }
  return program;
}

std::vector<std::string> unsupported(const ptx::Module& module) {
  std::vector<std::string> list;
  const auto program = decode(module);
  for (const Function& function : program->functions) {
    for (size_t pc = 0; pc < function.code.size(); ++pc) {
      const Instruction& in = function.code[pc];
      if (in.is_unsupported) {
        list.push_back("line " + std::to_string(function.lines[pc]) + ": " +
                       function.unsupported[in.imm]);
      }
    }
  }
  return list;
}

}  // namespace gpu_emulator::exec
