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

// The comparison of f16 and bf16 is that of their f32 values; option[2]: 1 = bf16.
float half_value(const Instruction& in, uint32_t bits) {
  return in.option[2] ? bf16_to_float(bits) : f16_to_float(bits);
}

bool compare_floats(Compare compare, float a, float b) {
  const bool unordered = a != a || b != b;
  switch (compare) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return !unordered && a != b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
    case Compare::kEqu:
      return unordered || a == b;
    case Compare::kNeu:
      return a != b;
    case Compare::kLtu:
      return unordered || a < b;
    case Compare::kLeu:
      return unordered || a <= b;
    case Compare::kGtu:
      return unordered || a > b;
    case Compare::kGeu:
      return unordered || a >= b;
    case Compare::kNum:
      return !unordered;
    case Compare::kNan:
      return unordered;
  }
  return false;
}

uint32_t combined(const Instruction& in, uint32_t value, uint32_t with) {
  switch (in.option[0]) {
    case 1:
      return value & with;
    case 2:
      return value | with;
    case 3:
      return value ^ with;
    default:
      return value;
  }
}

// option[3]: Compare. Scalar halves: d and the complement e; packed: d of the low, e of the high.
template <bool kPacked>
Step run_setp_half(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const auto how = static_cast<Compare>(in.option[3]);
  uint32_t low = 0, high = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    const auto half = [&](int shift) {
      return static_cast<uint32_t>(compare_floats(how, half_value(in, a[i] >> shift & 0xffff),
                                                  half_value(in, b[i] >> shift & 0xffff)));
    };
    low |= half(0) << i;
    if (kPacked) high |= half(16) << i;
  }
  if (!kPacked) high = ~low;
  uint32_t with = in.option[0] ? warp.predicate(in.c) : 0;
  if (in.option[1]) with = ~with;
  if (in.d != kNoSlot) warp.set_predicate(in.d, mask, combined(in, low, with));
  if (in.e != kNoSlot) warp.set_predicate(in.e, mask, combined(in, high, with));
  return Step::kNext;
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
  if (with >= 0) {
    bool negated = false;
    out.c = decoder.source_predicate(decoder.operand(3), &negated);
    out.option[0] = static_cast<uint8_t>(with + 1);
    out.option[1] = negated;
  }
  if (is_half(type)) {
    out.option[2] = type == Type::kBf16 || type == Type::kBf16x2;
    out.option[3] = static_cast<uint8_t>(compare);
    out.run = size_of(type) == 4 ? run_setp_half<true> : run_setp_half<false>;
  } else {
    out.run = decoder.isa.lanes({LaneOp::kSetp, type, ftz, false, compare});
  }
  if (!out.run) throw Unsupported("comparison of this type");
  out.counter_class = InstructionClass::kCompare;
}

// set: the comparison as all ones or 1.0.

constexpr uint32_t kOneF32 = 0x3f800000;

Step run_set(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const auto how = static_cast<Compare>(in.option[3]);
  const bool wide = size_of(in.from) == 8;
  uint32_t result = 0;
  for_each_lane(mask, [&](int i) {
    bool value;
    if (in.from == Type::kF32) {
      value = compare_floats(how, unpack<float>(a[i]), unpack<float>(b[i]));
    } else if (is_half(in.from)) {
      value = compare_floats(how, half_value(in, a[i]), half_value(in, b[i]));
    } else {
      auto of = [&](const uint32_t* p, Slot slot) -> int64_t {
        if (wide) return static_cast<int64_t>(warp.lanes<uint64_t>(slot)[i]);
        if (in.from == Type::kS16) return static_cast<int16_t>(p[i]);
        if (in.from == Type::kS32) return static_cast<int32_t>(p[i]);
        return p[i];
      };
      const int64_t x = of(a, in.a), y = of(b, in.b);
      const bool below = in.from == Type::kU64 || in.from == Type::kB64
                             ? static_cast<uint64_t>(x) < static_cast<uint64_t>(y)
                             : x < y;
      switch (how) {
        case Compare::kEq:
          value = x == y;
          break;
        case Compare::kNe:
          value = x != y;
          break;
        case Compare::kLt:
          value = below;
          break;
        case Compare::kLe:
          value = below || x == y;
          break;
        case Compare::kGt:
          value = !below && x != y;
          break;
        default:
          value = !below;
          break;
      }
    }
    result |= static_cast<uint32_t>(value) << i;
  });
  uint32_t with = in.option[0] ? warp.predicate(in.c) : 0;
  if (in.option[1]) with = ~with;
  result = combined(in, result, with);
  const uint32_t true_value = is_float(in.type) ? kOneF32 : ~0u;
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) { return result >> i & 1 ? true_value : 0u; });
  return Step::kNext;
}

void decode_set(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Compare compare = take_compare(decoder);
  decoder.take("ftz");
  const int with = decoder.take_any({"and", "or", "xor"});
  out.type = decoder.take_type();
  out.from = decoder.take_type();
  if (size_of(out.type) != 4 || (is_half(out.type)) || out.from == Type::kF64 ||
      out.from == Type::kF16x2 || out.from == Type::kBf16x2) {
    throw Unsupported("set of these types");
  }
  out.d = decoder.destination(0, 4);
  out.a = decoder.source(1, out.from);
  out.b = decoder.source(2, out.from);
  if (with >= 0) {
    bool negated = false;
    out.c = decoder.source_predicate(decoder.operand(3), &negated);
    out.option[0] = static_cast<uint8_t>(with + 1);
    out.option[1] = negated;
  }
  out.option[2] = out.from == Type::kBf16;
  out.option[3] = static_cast<uint8_t>(compare);
  out.run = run_set;
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

// slct: a where c >= 0, else b. option[0]: c is a float.
template <class C>
Step run_slct(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<C>(in.a);
  const auto* b = warp.lanes<C>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  const bool is_float = in.option[0];
  write_lanes<C>(warp, in.d, mask, [=](int i) {
    const bool first = is_float ? unpack<float>(c[i]) >= 0.0f : static_cast<int32_t>(c[i]) >= 0;
    return first ? a[i] : b[i];
  });
  return Step::kNext;
}

void decode_slct(Decoder& decoder) {
  Instruction& out = decoder.out;
  decoder.take("ftz");
  const Type type = decoder.take_type();
  const Type selector = decoder.take_type();
  out.d = decoder.destination(0, size_of(type));
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, type);
  out.c = decoder.source(3, selector);
  out.option[0] = selector == Type::kF32;
  out.run = size_of(type) == 8 ? run_slct<uint64_t> : run_slct<uint32_t>;
  out.counter_class = InstructionClass::kCompare;
}

// ----------------------------------------------------------------------- and, or, xor, not of all

enum PredicateOp : uint8_t { kPredAnd, kPredOr, kPredXor, kPredNot };

Step run_predicate(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t a = warp.predicate(in.a);
  const uint32_t b = in.b == kNoSlot ? 0 : warp.predicate(in.b);
  uint32_t result = 0;
  switch (in.option[0]) {
    case kPredAnd:
      result = a & b;
      break;
    case kPredOr:
      result = a | b;
      break;
    case kPredXor:
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
    if (predicate_op != kPredNot) out.b = decoder.source(2, type);
    out.option[0] = predicate_op;
    out.run = run_predicate;
    out.counter_class = InstructionClass::kCompare;
    return;
  }
  if (is_float(type)) throw Unsupported("logic on this type");
  if (predicate_op == kPredNot) {
    decode_unary(decoder, decoder.isa.lanes({op, type}), type, type);
  } else {
    decode_binary(decoder, decoder.isa.lanes({op, type}), type, type);
  }
}

void decode_and(Decoder& decoder) { decode_logic(decoder, LaneOp::kAnd, kPredAnd); }
void decode_or(Decoder& decoder) { decode_logic(decoder, LaneOp::kOr, kPredOr); }
void decode_xor(Decoder& decoder) { decode_logic(decoder, LaneOp::kXor, kPredXor); }
void decode_not(Decoder& decoder) { decode_logic(decoder, LaneOp::kNot, kPredNot); }

constexpr Form kForms[] = {
    {"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct},
    {"and", decode_and},   {"or", decode_or},   {"xor", decode_xor},   {"not", decode_not},
};

}  // namespace

std::span<const Form> compare_forms() { return kForms; }

}  // namespace gpu_emulator::exec
