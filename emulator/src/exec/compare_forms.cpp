// setp, set, selp, slct and logic on predicates (PTX 9.7.6, 9.7.8).

#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {

using ptx::Operand;
using ptx::Type;

Compare take_compare(Decoder& decoder) {
  constexpr Compare kOf[] = {
      Compare::kEq,  Compare::kNe,  Compare::kLt,  Compare::kLe,  Compare::kGt,  Compare::kGe,
      Compare::kEqu, Compare::kNeu, Compare::kLtu, Compare::kLeu, Compare::kGtu, Compare::kGeu,
      Compare::kNum, Compare::kNan, Compare::kLt,  Compare::kLe,  Compare::kGt,  Compare::kGe};
  const int found = decoder.take_any({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu",
                                      "leu", "gtu", "geu", "num", "nan", "lo", "ls", "hi", "hs"});
  if (found < 0) throw Unsupported("no comparison");
  return kOf[found];
}

namespace {

#include "lane_access.inc.h"
#include "lane_operations.inc.h"

// The comparison of f16 and bf16 is that of their f32 values.
float half_value(const CompareOptions& how, uint32_t bits) {
  if (how.is_bf16) return bf16_to_float(bits);
  const bool is_subnormal = !(bits & 0x7c00);
  return f16_to_float(how.flush && is_subnormal ? bits & 0x8000 : bits);
}

// Scalar halves: d and the complement e; packed: d of the low, e of the high.
template <bool kPacked>
Step run_setp_half(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const CompareOptions how = options<CompareOptions>(in);
  uint32_t low = 0, high = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    const auto half = [&](int shift) {
      return static_cast<uint32_t>(compare(how.compare, half_value(how, a[i] >> shift & 0xffff),
                                           half_value(how, b[i] >> shift & 0xffff)));
    };
    low |= half(0) << i;
    if (kPacked) high |= half(16) << i;
  }
  set_predicates(warp, in, mask, low, kPacked ? high : ~low);
  return Step::kNext;
}

// `with` is the index of and, or, xor, the combination with a predicate, -1 without one.
void decode_comparison(Decoder& decoder, Compare compare, int with, Type type, bool ftz) {
  CompareOptions& how = make_options<CompareOptions>(decoder.out);
  how.compare = compare;
  how.is_bf16 = type == Type::kBf16 || type == Type::kBf16x2;
  how.flush = ftz;
  if (with < 0) return;
  decoder.out.c = decoder.source_predicate(decoder.operand(3), &how.negated);
  how.combination = static_cast<Combination>(with + 1);
}

void decode_setp(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Compare compare = take_compare(decoder);
  const bool ftz = decoder.take("ftz");
  const int with = decoder.take_any({"and", "or", "xor"});
  const Type type = decoder.take_type();
  const auto results = decoder.elements(decoder.operand(0));
  out.d = decoder.destination(results.at(0), 0, true);
  if (results.size() > 1) out.e = decoder.destination(results[1], 0, true);
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, type);
  decode_comparison(decoder, compare, with, type, ftz);
  if (is_half(type)) {
    out.run = size_of(type) == 4 ? run_setp_half<true> : run_setp_half<false>;
  } else {
    out.run = decoder.isa.lanes({LaneOp::kSetp, type, ftz, false, compare});
  }
  if (!out.run) throw Unsupported("comparison of this type");
  out.counter_class = InstructionClass::kCompare;
}

// set: the comparison as all ones or 1.0.

void write_set(Warp& warp, const Instruction& in, uint32_t mask, uint32_t result) {
  constexpr uint32_t kOneF32 = 0x3f800000;
  const uint32_t combined = combine(in, result, combining_predicate(warp, in));
  const uint32_t true_value = is_float(in.type) ? kOneF32 : ~0u;
  write_lanes<uint32_t>(warp, in.d, mask,
                        [=](int i) { return combined >> i & 1 ? true_value : 0u; });
}

template <class T, bool kFtz = false>
Step run_set(Warp& warp, const Instruction& in, uint32_t mask) {
  const Compare how = options<CompareOptions>(in).compare;
  write_set(warp, in, mask, compare_lanes<T, kFtz>(how, warp, in));
  return Step::kNext;
}

Step run_set_half(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const CompareOptions how = options<CompareOptions>(in);
  uint32_t result = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    result |=
        static_cast<uint32_t>(compare(how.compare, half_value(how, a[i]), half_value(how, b[i])))
        << i;
  }
  write_set(warp, in, mask, result);
  return Step::kNext;
}

Handler set_handler(Type from, bool ftz) {
  switch (from) {
    case Type::kS16:
      return run_set<int16_t>;
    case Type::kB16:
    case Type::kU16:
      return run_set<uint16_t>;
    case Type::kS32:
      return run_set<int32_t>;
    case Type::kB32:
    case Type::kU32:
      return run_set<uint32_t>;
    case Type::kS64:
      return run_set<int64_t>;
    case Type::kB64:
    case Type::kU64:
      return run_set<uint64_t>;
    case Type::kF32:
      return ftz ? run_set<float, true> : run_set<float>;
    case Type::kF64:
      return run_set<double>;
    case Type::kF16:
    case Type::kBf16:
      return run_set_half;
    default:
      throw Unsupported("set of these types");
  }
}

void decode_set(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Compare compare = take_compare(decoder);
  const bool ftz = decoder.take("ftz");
  const int with = decoder.take_any({"and", "or", "xor"});
  out.type = decoder.take_type();
  out.from = decoder.take_type();
  if (size_of(out.type) != 4 || is_half(out.type)) throw Unsupported("set of these types");
  out.d = decoder.destination(0, 4);
  out.a = decoder.source(1, out.from);
  out.b = decoder.source(2, out.from);
  decode_comparison(decoder, compare, with, out.from, ftz);
  out.run = set_handler(out.from, ftz);
  out.counter_class = InstructionClass::kCompare;
}

void decode_selp(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Type type = decoder.take_type();
  bool negated = false;
  out.d = decoder.destination(0, size_of(type));
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, type);
  out.c = decoder.source_predicate(decoder.operand(3), &negated);
  if (negated) std::swap(out.a, out.b);
  out.run = decoder.isa.lanes({LaneOp::kSelect, type});
  out.counter_class = InstructionClass::kCompare;
}

// slct: a where c >= 0, else b.
template <class C>
Step run_slct(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<C>(in.a);
  const auto* b = warp.lanes<C>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  const SelectOptions how = options<SelectOptions>(in);
  write_lanes<C>(warp, in.d, mask, [=](int i) {
    const float x = unpack<float>(c[i]);
    const bool first =
        how.float_selector ? (how.flush ? flush(x) : x) >= 0.0f : static_cast<int32_t>(c[i]) >= 0;
    return first ? a[i] : b[i];
  });
  return Step::kNext;
}

void decode_slct(Decoder& decoder) {
  Instruction& out = decoder.out;
  SelectOptions& how = make_options<SelectOptions>(out);
  how.flush = decoder.take("ftz");
  const Type type = decoder.take_type();
  const Type selector = decoder.take_type();
  out.d = decoder.destination(0, size_of(type));
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, type);
  out.c = decoder.source(3, selector);
  how.float_selector = selector == Type::kF32;
  out.run = size_of(type) == 8 ? run_slct<uint64_t> : run_slct<uint32_t>;
  out.counter_class = InstructionClass::kCompare;
}

// ------------------------------------------------------------------------ and, or, xor, not of all

Step run_predicate(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t a = warp.predicate(in.a);
  const uint32_t b = in.b == kNoSlot ? 0 : warp.predicate(in.b);
  uint32_t result = 0;
  switch (options<PredicateOptions>(in).op) {
    case PredicateOp::kAnd:
      result = a & b;
      break;
    case PredicateOp::kOr:
      result = a | b;
      break;
    case PredicateOp::kXor:
      result = a ^ b;
      break;
    default:
      result = ~a;
      break;
  }
  warp.set_predicate(in.d, mask, result);
  return Step::kNext;
}

void decode_logic(Decoder& decoder, LaneOp op, PredicateOp predicate_op) {
  const Type type = decoder.take_type();
  Instruction& out = decoder.out;
  if (type == Type::kPred) {
    out.d = decoder.destination(0, 0);
    out.a = decoder.source(1, type);
    if (predicate_op != PredicateOp::kNot) out.b = decoder.source(2, type);
    make_options<PredicateOptions>(out).op = predicate_op;
    out.run = run_predicate;
    out.counter_class = InstructionClass::kCompare;
    return;
  }
  if (is_float(type)) throw Unsupported("logic on this type");
  if (predicate_op == PredicateOp::kNot) {
    decode_unary(decoder, decoder.isa.lanes({op, type}), type, type);
  } else {
    decode_binary(decoder, decoder.isa.lanes({op, type}), type, type);
  }
}

void decode_and(Decoder& decoder) { decode_logic(decoder, LaneOp::kAnd, PredicateOp::kAnd); }
void decode_or(Decoder& decoder) { decode_logic(decoder, LaneOp::kOr, PredicateOp::kOr); }
void decode_xor(Decoder& decoder) { decode_logic(decoder, LaneOp::kXor, PredicateOp::kXor); }
void decode_not(Decoder& decoder) { decode_logic(decoder, LaneOp::kNot, PredicateOp::kNot); }

constexpr Form kForms[] = {
    {"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct},
    {"and", decode_and},   {"or", decode_or},   {"xor", decode_xor},   {"not", decode_not},
};

}  // namespace

std::span<const Form> compare_forms() { return kForms; }

}  // namespace gpu_emulator::exec
