#pragma once

// A decoded PTX module: what the scheduler executes. decode.cpp makes it from ptx::Module;
// the decoders of the opcode families (*_forms.cpp) choose a handler and resolve every operand to a
// slot of the register file, so that executing an instruction is one indirect call.
//
// Register file of a function frame: one slot a virtual register, 64-byte aligned, 32 lanes wide.
//   up to 32 bits   uint32_t[32]; 8- and 16-bit values zero-extended
//   64 bits         uint64_t[32]
//   128 bits        uint64_t[32] low halves, then uint64_t[32] high halves
//   predicate       one uint32_t, bit = lane
// Immediates lie in a constant pool of the function with the same layout; a slot with kConstantBit
// is an offset into that pool.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../ptx/module.h"
#include "counters.h"
#include "options.h"

namespace gpu_emulator::exec {

struct Warp;
struct Isa;  // isa.h: handlers by instruction set

using Slot = uint32_t;  // byte offset into the frame's registers or, with kConstantBit, constants
inline constexpr Slot kConstantBit = 1u << 31;
inline constexpr Slot kNoSlot = ~0u;  // absent operand, or the sink _
inline constexpr uint32_t kNoPc = ~0u;
inline constexpr uint32_t kAllLanes = ~0u;
inline constexpr int kWarpSize = 32;

enum class Step : uint8_t {
  kNext,   // executed: go on with the next instruction
  kJump,   // executed: the current fragment's pc, mask or state was set by the handler
  kRetry,  // not executed: wait, then execute it again (Fragment::wait says for what)
  kYield,  // executed; a polling instruction: let others run before the next one
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };
enum class Order : uint8_t { kWeak, kVolatile, kRelaxed, kAcquire, kRelease, kAcqRel, kSeqCst };
enum class Scope : uint8_t { kNone, kCta, kCluster, kGpu, kSys };

struct Instruction;

// Executes the instruction for the lanes of mask (not empty) of the warp's current fragment.
using Handler = Step (*)(Warp&, const Instruction&, uint32_t mask);

struct Instruction {
  Handler run = nullptr;
  Slot guard = kNoSlot;  // predicate
  Slot d = kNoSlot, a = kNoSlot, b = kNoSlot, c = kNoSlot;
  Slot e = kNoSlot;             // a fourth source or a second destination: as the family says
  uint32_t list = 0;            // first of `count` slots in Function::lists: vectors, fragments
  uint32_t target = kNoPc;      // branches
  int64_t imm = 0;              // address offset, lop3 table, group count: as the family says
  int64_t option_offset = 0;    // a second address offset: as the family says
  uint32_t reconverge = kNoPc;  // branches: immediate post-dominator, kNoPc = the function's end
  uint16_t count = 0;
  uint8_t bytes = 0;  // memory: bytes of one element; otherwise as the family says
  ptx::Type type = ptx::Type::kNone, from = ptx::Type::kNone;
  Space space = Space::kGeneric;
  Order order = Order::kWeak;
  Scope scope = Scope::kNone;
  FamilyOptions options;
  bool guard_negated = false;
  bool is_unsupported = false;
  bool wide_address = false;  // `a` (or `d` of an asynchronous copy) holds 64-bit addresses
  InstructionClass counter_class = InstructionClass::kOther;
};
static_assert(sizeof(Instruction) <= 80);

// The options of an instruction of that family; std::bad_variant_access of any other.
template <class T>
const T& options(const Instruction& in) {
  return std::get<T>(in.options);
}

// For decoders: the same, made where there are none yet.
template <class T>
T& make_options(Instruction& in) {
  if (std::holds_alternative<std::monostate>(in.options)) in.options.emplace<T>();
  return std::get<T>(in.options);
}

// How what an instruction writes depends on what it reads: for checks of undefined values.
enum class Flow : uint8_t {
  kUnion,       // every result on every source
  kMove,        // the sources side by side are the results side by side, `bits` bits of each
  kSelect,      // selp: a, b by predicate c
  kLogic,       // and, or: a and b decide bit by bit
  kShift,       // shl, shr of b32: a by b
  kHalves,      // packed 16-bit arithmetic: each half on the same halves
  kPackHalves,  // cvt to a pair: high half on the first source, low half on the second
  kShuffle,     // shfl: on another lane
  kLanes,       // vote, match, redux: on all lanes
  kLoad,        // in memory order what lies at the address
  kLoadMatrix,  // ldmatrix
  kLoadMatrixTransposed,
  kStore,        // reads the address `a`, then what it stores
  kStoreMatrix,  // stmatrix
  kAtomic,
  kMatrix,           // mma: rows of A and columns of B; lists D, A, B, C
  kWarpgroupMatrix,  // wgmma: as mma of A in registers; operands in shared memory come later
  kAddress,          // results are defined; sources are addresses, counts, barriers
  kNone,             // nothing to follow
};

// Slots an instruction reads and writes, in Function::effects. Slots are in order of the operands;
// in effect_slots the low four bits of each are its size in units of 64 bytes. Sinks (kNoSlot) and
// constants stand there for kMove only.
struct Effects {
  uint32_t first_read = 0, first_write = 0;  // into Function::effect_slots
  uint16_t reads = 0, writes = 0;
  Flow flow = Flow::kUnion;
  uint8_t bits = 0;        // kMove: of all sources together; kLogic: 1 = and, 2 = or; kShift: 1 =
                           // left, 2 = right; kAtomic: 1 = what was there does not matter (exch)
  bool ends_flow = false;  // ret, exit, trap, a branch without guard
};
inline constexpr Slot kEffectSizeMask = 15;

// A slot filled when a frame is made: special registers and addresses known only at launch.
struct FrameValue {
  enum class Kind : uint8_t {
    kSpecial,  // special: a register that does not change while the warp runs
    kShared,   // address of module variable `variable` in the CTA's shared memory, + offset
    kModule,   // Launch::module_base + offset
    kLocal,    // address of a local or param variable of this frame: offset in the frame
  };
  Kind kind = Kind::kSpecial;
  bool generic = false;  // window address in a 64-bit slot
  bool wide = false;     // 64-bit slot
  Slot slot = kNoSlot;
  int64_t offset = 0;
  int variable = -1;
  std::string special;
};

struct ParamLayout {
  uint32_t offset = 0, bytes = 0;
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<Instruction> code;  // index = index into ptx::Function::body
  std::vector<int> lines;         // PTX line of each instruction
  std::vector<ptx::SourceLocation> sources;
  std::vector<Slot> lists;
  std::vector<Effects> effects;
  std::vector<Slot> effect_slots;
  std::vector<std::vector<uint32_t>> branch_tables;  // brx.idx: pcs
  std::vector<std::string> unsupported;              // by Instruction::imm of failing instructions

  uint32_t register_bytes = 0;
  std::vector<std::byte> constants;  // until they lie in constant_pool
  const std::byte* constant_pool = nullptr;
  std::vector<FrameValue> frame_values;

  std::vector<ParamLayout> params;   // entry: in the launch's parameter block; else in the frame
  std::vector<ParamLayout> returns;  // not of entries: in the frame's local memory
  uint32_t param_bytes = 0;          // entry: size of the parameter block
  uint32_t local_bytes = 0;   // a lane's local memory in one frame, .param variables included
  uint32_t shared_bytes = 0;  // entry: static shared memory, callees included
  std::vector<int64_t> shared_offsets;  // entry: by Program::shared_variables; -1 = not used
  int max_live_registers = 0;  // 32-bit registers alive at once: an estimate of ptxas' count
  int max_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0};
  int min_ctas_per_sm = 0, max_registers = 0;
  int cluster[3] = {0, 0, 0};
  bool explicit_cluster = false;
};

struct Program {
  std::vector<Function> functions;                  // index = index into ptx::Module::functions
  std::vector<std::string> files;                   // .file table, for source lines in reports
  std::shared_ptr<const SourceLines> source_lines;  // the PTX text, for reports and counters
  std::string target;
  const Isa* isa = nullptr;  // of the handlers

  // Module variables (.global, .const) as one image, placed at Launch::module_base.
  uint64_t module_bytes = 0;
  std::vector<int64_t> variable_offsets;  // by ptx::Module::variables; -1 = not in the image
  std::vector<std::string> variable_names;
  std::vector<uint64_t> variable_bytes;

  struct SharedVariable {
    int function = -1;  // -1: of the module
    int variable = -1;
    uint64_t bytes = 0;
    uint32_t alignment = 1;
    bool dynamic = false;  // extern: begins where the static ones end
  };
  std::vector<SharedVariable> shared_variables;

  // The image with relocations for this base: module_bytes bytes.
  std::vector<std::byte> image(uint64_t module_base) const;
  int find_function(const std::string& name) const;  // -1 = none

  struct Relocation {
    uint64_t offset;  // in the image
    int64_t value;    // added to module_base, or a function's address
    bool is_function;
  };
  std::vector<std::byte> initial_image;
  std::vector<Relocation> relocations;
  std::vector<std::unique_ptr<std::byte[]>> pools;
};

// Decodes a module. Never fails for an unknown opcode: that becomes an instruction that fails when
// it is executed, naming itself.
// isa: whose handlers to use; null = the best of this machine.
std::unique_ptr<Program> decode(const ptx::Module& module, const Isa* isa = nullptr);

// "line 12: mma.sync.aligned.m8n8k4... (reason)" of each instruction the emulator cannot execute.
std::vector<std::string> unsupported(const ptx::Module& module);

}  // namespace gpu_emulator::exec
