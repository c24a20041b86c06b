#pragma once

// A PTX module as text says it (PTX ISA 9.0, sections 4 and 5), with every name resolved:
// registers, variables, labels and functions are indices. What an opcode means is not known here;
// src/exec/decode.cpp decides that.

#include <cstdint>
#include <string>
#include <vector>

namespace gpu_emulator::ptx {

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBf16,
  kBf16x2,
  kF32,
  kF32x2,
  kF64,
};

uint32_t type_bytes(Type type);  // in memory; 0 of kNone and kPred

enum class Space : uint8_t { kReg, kConst, kGlobal, kLocal, kParam, kShared };

struct Operand {
  enum class Kind : uint8_t {
    kRegister,   // index: Function::registers
    kSpecial,    // name: "%tid.x", ...
    kSink,       // _
    kImmediate,  // value: integers sign-extended to 64 bits; floats: is_float, value holds the bits
                 // of an f64 (or f32 for 0f)
    kVariable,   // address of a variable: index, variable_scope; value = added offset
    kLabel,      // index: Function::labels
    kFunction,   // index: Module::functions
    kVector,  // {a, b, ...}: elements. Also tensor coordinates, call argument lists in parentheses,
              // and a vector register named as a whole
    kBranchTargets,  // index: Function::branch_targets
    kPair,           // a|b: two elements
    kMemory,  // [base + value]: elements[0] is base (register, variable or immediate); further
              // elements: what follows it after commas, e.g. coordinates in [map, {c0, c1}]
    kName,    // any other bare word (prototype names, ...): name
  };
  // Which list `index` of a kVariable is for: Module::variables, Function::variables, ::params,
  // ::returns.
  enum class Scope : uint8_t { kModule, kFunction, kParam, kReturn };

  Kind kind = Kind::kSink;
  bool negated = false;   // !%p or -%r
  bool is_float = false;  // kImmediate
  bool is_f32 = false;    // kImmediate written 0fXXXXXXXX
  Scope variable_scope = Scope::kModule;
  int index = -1;
  int64_t value = 0;
  std::string name;
  std::vector<Operand> elements;
};

struct SourceLocation {
  int file = 0;  // index into Module::files; 0 = none
  int line = 0;
  int column = 0;
};

struct Instruction {
  std::string opcode;                  // "ld", "mma", "cp": the word before the first dot
  std::vector<std::string> modifiers;  // "global", "L2::128B", "v4", "b32": in order, without dots
  std::vector<Operand> operands;
  int guard = -1;  // register index of @%p, -1 = none
  bool guard_negated = false;
  int line = 0;           // 1-based line of the PTX text
  SourceLocation source;  // from .loc (with -lineinfo)
};

struct Register {
  std::string name;
  Type type = Type::kNone;
};

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  Type type = Type::kNone;
  uint64_t bytes = 0;  // 0: extern, of a size known at launch
  uint32_t alignment = 1;
  bool is_extern = false;
  std::vector<uint8_t> initial;  // of the first bytes; the others are zero
  struct Relocation {  // initial[offset...offset+8) += address of a module variable or function
    uint64_t offset;
    bool is_function;
    int index;
  };
  std::vector<Relocation> relocations;
};

struct Label {
  std::string name;
  int instruction = 0;  // index into Function::body (may be body.size())
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<Variable> params;  // space kParam, or kReg: the register of that name
  std::vector<Variable> returns;
  std::vector<Variable> variables;  // .local, .shared, .param declared inside, in all nested scopes
  std::vector<Register> registers;  // of all nested scopes, those that the body names; a vector
                                    // register is several
  std::vector<Label> labels;
  std::vector<Instruction> body;
  std::vector<std::vector<int>> branch_targets;  // .branchtargets tables, label indices
  int max_threads[3] = {0, 0, 0};                // .maxntid; 0 = not given
  int required_threads[3] = {0, 0, 0};           // .reqntid
  int min_ctas_per_sm = 0;                       // .minnctapersm
  int max_registers = 0;                         // .maxnreg
  int cluster[3] = {0, 0, 0};                    // .reqnctapercluster
  bool explicit_cluster = false;
};

struct Module {
  std::string source;  // the text, for reports
  int version_major = 0, version_minor = 0;
  std::string target;              // "sm_90a"
  std::vector<std::string> files;  // of .file, in order of appearance; files[0] is ""
  std::vector<Variable> variables;
  std::vector<Function> functions;
};

}  // namespace gpu_emulator::ptx
