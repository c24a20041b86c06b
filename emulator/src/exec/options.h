#pragma once

// What an instruction's modifiers say to its handler: one struct a family of opcodes, and in
// Instruction::options the one of its own. options<T>(instruction), in program.h, reads it.

#include <cstdint>
#include <optional>
#include <type_traits>
#include <variant>

#include "number_formats.h"
#include "reduction.h"

namespace gpu_emulator::exec {

// ------------------------------------------------------------------------------------- arithmetic

struct RoundingOptions {  // f32 and f64
  Rounding rounding = Rounding::kNearest;
};

struct CarryOptions {  // add.cc, addc, sub.cc, subc, mad.cc, madc
  bool carry_in = false, carry_out = false;
  bool subtract = false;
  bool high = false;  // mad: the product's high half
};

struct MinMaxOptions {  // f32 with .NaN or .xorsign.abs
  bool maximum = false;
  bool nan = false;  // a NaN wins
  bool xorsign_abs = false;
  bool flush = false;
};

enum class HalfOp : uint8_t { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs, kEx2, kTanh };
struct HalfOptions {  // f16, bf16 and the packed types
  HalfOp op = HalfOp::kAdd;
  bool flush = false;
  bool saturate = false, relu = false;    // add, sub, mul, fma
  bool nan = false, xorsign_abs = false;  // min, max
};

enum class TestProperty : uint8_t {
  kFinite,
  kInfinite,
  kNumber,
  kNotANumber,
  kNormal,
  kSubnormal,
};
struct TestOptions {  // testp
  TestProperty property = TestProperty::kFinite;
};

enum class PermuteMode : uint8_t { kBytes, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };
struct PermuteOptions {  // prmt
  PermuteMode mode = PermuteMode::kBytes;
};

struct BitMaskOptions {  // bmsk
  bool wrap = false;     // position and length, to 5 bits
};

// ------------------------------------------------------------- comparisons, conversions and moves

enum class Compare : uint8_t {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
};
enum class Combination : uint8_t { kNone, kAnd, kOr, kXor };
struct CompareOptions {  // setp, set
  Compare compare = Compare::kEq;
  Combination combination = Combination::kNone;  // of the result with predicate c
  bool negated = false;                          // c
  bool is_bf16 = false, flush = false;           // of halves
};

struct SelectOptions {  // slct
  bool float_selector = false, flush = false;
};

enum class PredicateOp : uint8_t { kAnd, kOr, kXor, kNot };
struct PredicateOptions {  // and, or, xor, not of predicates
  PredicateOp op = PredicateOp::kAnd;
};

enum class PairType : uint8_t { kBf16x2, kF16x2, kE4m3x2, kE5m2x2 };
struct ConvertOptions {  // cvt
  Rounding rounding = Rounding::kNearest;
  bool to_integer : 1 = false;  // .rni, .rzi, ...: also where the result is a float
  bool saturate : 1 = false;
  bool flush : 1 = false;
  bool relu : 1 = false;
  bool saturate_to_finite : 1 = false;
  bool away_from_ties : 1 = false;       // .rna
  PairType pair = PairType::kBf16x2;     // where the result or, of fp8, the source is a pair
  uint8_t to_bytes = 0, from_bytes = 0;  // of the registers, where neither is
};

struct PredicateMoveOptions {  // mov.pred
  bool negated = false;
};

enum class ClockRegister : uint8_t { kClock, kClockHigh, kTimer, kTimerHigh };
struct ClockOptions {  // mov of %clock and %globaltimer
  ClockRegister source = ClockRegister::kClock;
};

struct PackOptions {       // mov between a register and a vector
  uint8_t part_bytes = 0;  // of an element
};

// ---------------------------------------------------------------------------------------- memory

struct AccessOptions {        // ld, st
  uint8_t wide_elements = 0;  // bit k: element k's register has 64 bits
  bool registers_of_16_bits = false;
};

struct AddressOptions {       // cvta
  bool from_generic = false;  // .to
};

struct SpaceOptions {    // isspacep
  bool own_cta = false;  // shared memory of the thread's CTA only
};

enum class AtomicOp : uint8_t { kAdd, kExch, kCas, kMin, kMax, kAnd, kOr, kXor, kInc, kDec };
struct AtomicOptions {  // atom, red
  AtomicOp op = AtomicOp::kAdd;
};

struct MatrixMoveOptions {  // ldmatrix, stmatrix
  bool transposed = false;
};

struct CopyOptions {              // cp.async
  bool ignores_source = false;    // b: the predicate that says so; else the source's bytes
  bool wide_destination = false;  // d holds 64-bit addresses
};

struct CopyWaitOptions {   // cp.async.wait_group, wait_all
  bool ungrouped = false;  // all copies, also those of no group
};

enum class BulkDirection : uint8_t {
  kGlobalToShared,
  kSharedToGlobal,
  kSharedToShared,
  kRegistersToShared,  // st.async, red.async
};
struct BulkOptions {  // copies of the async proxy, st.async, red.async
  BulkDirection direction = BulkDirection::kGlobalToShared;
  uint8_t wide_bases = 0;  // bit i: base i of the instruction's list has 64 bits
  std::optional<ReductionOp> reduction;
};

struct BulkWaitOptions {  // cp.async.bulk.wait_group
  bool reads_only = false;
};

// ------------------------------------------------------------- warps, barriers and control flow

enum class ShuffleMode : uint8_t { kUp, kDown, kButterfly, kIndex };
struct ShuffleOptions {  // shfl
  ShuffleMode mode = ShuffleMode::kIndex;
};

enum class VoteMode : uint8_t { kAll, kAny, kUniform, kBallot };
struct VoteOptions {  // vote
  VoteMode mode = VoteMode::kAll;
  bool negated = false;  // the predicate
};

struct MatchOptions {  // match
  bool all = false;
};

enum class ReduxOp : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };
struct ReduxOptions {  // redux
  ReduxOp op = ReduxOp::kAdd;
};

enum class BarrierKind : uint8_t { kSync, kArrive, kReduceAnd, kReduceOr, kReducePopc };
struct BarrierOptions {  // bar, barrier
  BarrierKind kind = BarrierKind::kSync;
  bool negated = false;  // the predicate of a reduction
  bool aligned = false;
};

struct ClusterBarrierOptions {  // barrier.cluster
  bool aligned = false;
};

enum class MbarrierUpdate : uint8_t { kArrive, kExpect, kComplete };
struct MbarrierOptions {  // mbarrier.arrive, arrive_drop, expect_tx, complete_tx
  MbarrierUpdate update = MbarrierUpdate::kArrive;
  bool drop = false, no_complete = false, expect_first = false;  // of an arrival
};

struct MbarrierWaitOptions {  // mbarrier.test_wait, try_wait
  bool parity = false;        // b: the phase's parity; else its state
};

struct CopyArriveOptions {  // cp.async.mbarrier.arrive
  bool no_increment = false;
};

struct RegisterCountOptions {  // setmaxnreg
  bool increases = false;
};

struct CallOptions {      // call
  bool indirect = false;  // through a
  uint8_t results = 0;
};

// --------------------------------------------------------------------------------------- products

enum class MatrixType : uint8_t { kF16, kBf16, kTf32, kE4m3, kE5m2, kS8, kU8 };
enum class AccumulatorType : uint8_t { kF32, kF16, kS32, kS32Saturated };
struct WgmmaOptions {  // wgmma.mma_async
  MatrixType a = MatrixType::kF16, b = MatrixType::kF16;
  AccumulatorType d = AccumulatorType::kF32;
  bool a_in_registers : 1 = false;
  bool a_mn_major : 1 = false, b_mn_major : 1 = false;
  bool negate_a : 1 = false, negate_b : 1 = false;
};

using FamilyOptions =
    std::variant<std::monostate, RoundingOptions, CarryOptions, MinMaxOptions, HalfOptions,
                 TestOptions, PermuteOptions, BitMaskOptions, CompareOptions, SelectOptions,
                 PredicateOptions, ConvertOptions, PredicateMoveOptions, ClockOptions, PackOptions,
                 AccessOptions, AddressOptions, SpaceOptions, AtomicOptions, MatrixMoveOptions,
                 CopyOptions, CopyWaitOptions, BulkOptions, BulkWaitOptions, ShuffleOptions,
                 VoteOptions, MatchOptions, ReduxOptions, BarrierOptions, ClusterBarrierOptions,
                 MbarrierOptions, MbarrierWaitOptions, CopyArriveOptions, RegisterCountOptions,
                 CallOptions, WgmmaOptions>;
static_assert(std::is_trivially_copyable_v<FamilyOptions> && sizeof(FamilyOptions) <= 8);

}  // namespace gpu_emulator::exec
