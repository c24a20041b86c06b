// Opcodes that exist for integers and floats (PTX 9.7.1 to 9.7.4): add, sub, mul, mad, fma, min,
// max, neg, abs, div, rem.

#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "report.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

#include "lane_access.inc.h"
#include "lane_operations.inc.h"

using ptx::Type;

// -------------------------------------------------------------------------------- integer division

struct Quotient {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(-1);  // as hardware does; PTX leaves it unspecified
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return static_cast<T>(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
    }
    return static_cast<T>(a / b);
  }
};

struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
};

template <class Op>
Handler integer_binary(Type type) {
  switch (type) {
    case Type::kS16:
      return run_binary<Op, int16_t, int16_t>;
    case Type::kU16:
      return run_binary<Op, uint16_t, uint16_t>;
    case Type::kS32:
      return run_binary<Op, int32_t, int32_t>;
    case Type::kU32:
      return run_binary<Op, uint32_t, uint32_t>;
    case Type::kS64:
      return run_binary<Op, int64_t, int64_t>;
    case Type::kU64:
      return run_binary<Op, uint64_t, uint64_t>;
    default:
      throw Unsupported("integer operation of this type");
  }
}

struct AddSaturated {
  static int32_t apply(int32_t a, int32_t b) {
    int32_t sum;
    if (!__builtin_add_overflow(a, b, &sum)) return sum;
    return a < 0 ? INT32_MIN : INT32_MAX;
  }
};
struct SubSaturated {
  static int32_t apply(int32_t a, int32_t b) {
    int32_t difference;
    if (!__builtin_sub_overflow(a, b, &difference)) return difference;
    return a < 0 ? INT32_MIN : INT32_MAX;
  }
};

// -------------------------------------------------------------------------------- carry and borrow

// e: the carry flag's lanes.
template <class T>
Step run_carry(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<T>(in.a);
  const auto* b = warp.lanes<T>(in.b);
  auto* d = warp.lanes<T>(in.d);
  auto* flag = warp.lanes<uint32_t>(in.e);
  const CarryOptions how = options<CarryOptions>(in);
  for_each_lane(mask, [&](int i) {
    // A borrow is kept as the missing carry: a - b = a + ~b + 1.
    const T y = how.subtract ? static_cast<T>(~b[i]) : b[i];
    const T carry_in = how.carry_in ? flag[i] & 1 : (how.subtract ? 1 : 0);
    T sum;
    const bool first = __builtin_add_overflow(a[i], y, &sum);
    const bool second = __builtin_add_overflow(sum, carry_in, &sum);
    d[i] = sum;
    if (how.carry_out) flag[i] = first || second;
  });
  return Step::kNext;
}

void decode_carry(Decoder& decoder, bool carry_in, bool carry_out, bool subtract) {
  const Type type = decoder.take_type();
  if (size_of(type) < 4) throw Unsupported("carry of this type");
  Handler handler = size_of(type) == 8 ? run_carry<uint64_t> : run_carry<uint32_t>;
  decode_binary(decoder, handler, type, type);
  decoder.out.e = decoder.function.special("%carry", 4);
  make_options<CarryOptions>(decoder.out) = {carry_in, carry_out, subtract, false};
}

// mad.cc, madc: the product's half, then add with carry.
template <class T, class W>
Step run_mad_carry(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<std::make_unsigned_t<T>>(in.a);
  const auto* b = warp.lanes<std::make_unsigned_t<T>>(in.b);
  const auto* c = warp.lanes<std::make_unsigned_t<T>>(in.c);
  auto* d = warp.lanes<std::make_unsigned_t<T>>(in.d);
  auto* flag = warp.lanes<uint32_t>(in.e);
  const CarryOptions how = options<CarryOptions>(in);
  for_each_lane(mask, [&](int i) {
    const W product = static_cast<W>(static_cast<T>(a[i])) * static_cast<W>(static_cast<T>(b[i]));
    using U = std::make_unsigned_t<T>;
    const U half = static_cast<U>(how.high ? product >> (8 * sizeof(T)) : product);
    U sum;
    const bool first = __builtin_add_overflow(half, c[i], &sum);
    const bool second = __builtin_add_overflow(sum, U(how.carry_in ? flag[i] & 1 : 0), &sum);
    d[i] = sum;
    if (how.carry_out) flag[i] = first || second;
  });
  return Step::kNext;
}

void decode_mad_carry(Decoder& decoder, bool carry_in, bool carry_out) {
  const bool high = decoder.take_any({"lo", "hi"}) == 1;
  const Type type = decoder.take_type();
  Handler handler = nullptr;
  if (type == Type::kU32) handler = run_mad_carry<uint32_t, uint64_t>;
  if (type == Type::kS32) handler = run_mad_carry<int32_t, int64_t>;
  if (type == Type::kU64) handler = run_mad_carry<uint64_t, unsigned __int128>;
  if (type == Type::kS64) handler = run_mad_carry<int64_t, __int128>;
  if (!handler) throw Unsupported("mad with carry of this type");
  decode_ternary(decoder, handler, type, type);
  decoder.out.e = decoder.function.special("%carry", 4);
  make_options<CarryOptions>(decoder.out) = {carry_in, carry_out, false, high};
}

// -------------------------------------------------------------------------- packed 16-bit integers

// T of both halves; Op as above.
template <class Op, class T>
struct Packed {
  static uint32_t apply(uint32_t a, uint32_t b) {
    const auto low = static_cast<uint16_t>(Op::apply(static_cast<T>(a), static_cast<T>(b)));
    const auto high =
        static_cast<uint16_t>(Op::apply(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
    return static_cast<uint32_t>(high) << 16 | low;
  }
};
template <class Op>
struct Relu {  // negative results become 0
  template <class T>
  static T apply(T a, T b) {
    const T value = Op::apply(a, b);
    return value < 0 ? T(0) : value;
  }
};

template <class Op>
Handler packed_handler(bool is_signed, bool relu) {
  if (relu) return run_binary<Packed<Relu<Op>, int16_t>, uint32_t, uint32_t>;
  return is_signed ? run_binary<Packed<Op, int16_t>, uint32_t, uint32_t>
                   : run_binary<Packed<Op, uint16_t>, uint32_t, uint32_t>;
}

bool decode_packed_integer(Decoder& decoder, LaneOp op) {
  const int packed = decoder.take_any({"u16x2", "s16x2"});
  if (packed < 0) return false;
  const bool relu = decoder.take("relu");
  Handler handler = nullptr;
  if (op == LaneOp::kAdd) handler = packed_handler<Add>(packed == 1, false);
  if (op == LaneOp::kMin) handler = packed_handler<Min>(packed == 1, relu);
  if (op == LaneOp::kMax) handler = packed_handler<Max>(packed == 1, relu);
  if (!handler) throw Unsupported("packed operation");
  decode_binary(decoder, handler, Type::kB32, Type::kB32);
  return true;
}

// ---------------------------------------------------------------------- min and max with modifiers

float min_max(const MinMaxOptions& how, float x, float y) {
  if (how.flush) x = flush(x), y = flush(y);
  uint32_t a = __builtin_bit_cast(uint32_t, x), b = __builtin_bit_cast(uint32_t, y);
  const uint32_t sign = (a ^ b) & 0x80000000;
  if (how.xorsign_abs) a &= 0x7fffffff, b &= 0x7fffffff;
  x = __builtin_bit_cast(float, a);
  y = __builtin_bit_cast(float, b);
  if (how.nan && (x != x || y != y)) return __builtin_bit_cast(float, 0x7fffffff);
  if (x != x && y != y) return __builtin_bit_cast(float, 0x7fffffff);
  float result;
  if (x != x) {
    result = y;
  } else if (y != y) {
    result = x;
  } else if (x == y) {
    result = __builtin_bit_cast(float, how.maximum ? (a & b) : (a | b));
  } else {
    result = (x > y) == how.maximum ? x : y;
  }
  if (!how.xorsign_abs) return result;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, result) | sign);
}

Step run_min_max(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const MinMaxOptions how = options<MinMaxOptions>(in);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    return pack<float>(min_max(how, unpack<float>(a[i]), unpack<float>(b[i])));
  });
  return Step::kNext;
}

void decode_min_max(Decoder& decoder, LaneOp op) {
  if (decode_packed_integer(decoder, op)) return;
  const bool ftz = decoder.take("ftz");
  const bool nan = decoder.take("NaN");
  const bool xorsign = decoder.take("xorsign");
  const Type type = decoder.take_type();
  if (is_half(type)) {
    if (xorsign) decoder.take("abs");
    decode_half(decoder, op, type, {.flush = ftz, .nan = nan, .xorsign_abs = xorsign});
    return;
  }
  if (type == Type::kS32 && decoder.take("relu")) {
    decode_binary(decoder,
                  op == LaneOp::kMax ? run_binary<Relu<Max>, int32_t, int32_t>
                                     : run_binary<Relu<Min>, int32_t, int32_t>,
                  type, type);
    return;
  }
  if (type == Type::kF32 && (nan || xorsign)) {
    if (xorsign && !decoder.take("abs")) throw Unsupported("xorsign without abs");
    decode_binary(decoder, run_min_max, type, type);
    make_options<MinMaxOptions>(decoder.out) = {op == LaneOp::kMax, nan, xorsign, ftz};
    return;
  }
  decode_binary(decoder, decoder.isa.lanes({op, type, ftz}), type, type);
}

// --------------------------------------------------------------------------------------- the forms

bool take_nearest(Decoder& decoder, Rounding* rounding) {
  constexpr Rounding kModes[] = {Rounding::kNearest, Rounding::kZero, Rounding::kDown,
                                 Rounding::kUp};
  const int mode = decoder.take_any({"rn", "rz", "rm", "rp"});
  *rounding = mode < 0 ? Rounding::kNearest : kModes[mode];
  return *rounding == Rounding::kNearest;
}

// add, sub, mul of floats and fma; `operands` without the destination.
void decode_float(Decoder& decoder, LaneOp op, int operands, bool relu = false) {
  Rounding rounding;
  const bool nearest = take_nearest(decoder, &rounding);
  const bool ftz = decoder.take("ftz");
  const bool saturate = decoder.take("sat");
  const Type type = decoder.take_type();
  if (is_half(type)) {
    decode_half(decoder, op, type, {.flush = ftz, .saturate = saturate, .relu = relu});
    return;
  }
  if (type != Type::kF32 && type != Type::kF64) throw Unsupported("operation of this type");
  if (relu) throw Unsupported("relu of this type");
  Handler handler = nearest ? decoder.isa.lanes({op, type, ftz, saturate})
                            : rounded_handler(op, type, ftz, saturate);
  if (operands == 2) decode_binary(decoder, handler, type, type);
  if (operands == 3) decode_ternary(decoder, handler, type, type);
  make_options<RoundingOptions>(decoder.out).rounding = rounding;
  decoder.out.counter_class = InstructionClass::kFloat;
}

// Whether the instruction's last type is a float's, without taking it.
bool has_float_type(const Decoder& decoder) {
  for (const std::string& modifier : decoder.ast.modifiers) {
    const auto type = type_named(modifier);
    if (type && is_float(*type)) return true;
  }
  return false;
}

void decode_add_sub(Decoder& decoder, LaneOp op) {
  if (has_float_type(decoder)) return decode_float(decoder, op, 2);
  if (decoder.take("cc")) return decode_carry(decoder, false, true, op == LaneOp::kSub);
  if (decode_packed_integer(decoder, op)) return;
  const bool saturate = decoder.take("sat");
  const Type type = decoder.take_type();
  if (saturate) {
    if (type != Type::kS32) throw Unsupported("saturation of this type");
    decode_binary(decoder,
                  op == LaneOp::kAdd ? run_binary<AddSaturated, int32_t, int32_t>
                                     : run_binary<SubSaturated, int32_t, int32_t>,
                  type, type);
    return;
  }
  decode_binary(decoder, decoder.isa.lanes({op, type}), type, type);
}

void decode_add(Decoder& decoder) { decode_add_sub(decoder, LaneOp::kAdd); }
void decode_sub(Decoder& decoder) { decode_add_sub(decoder, LaneOp::kSub); }
void decode_addc(Decoder& decoder) { decode_carry(decoder, true, decoder.take("cc"), false); }
void decode_subc(Decoder& decoder) { decode_carry(decoder, true, decoder.take("cc"), true); }

Type wide_of(Type type) {
  switch (type) {
    case Type::kU16:
      return Type::kU32;
    case Type::kS16:
      return Type::kS32;
    case Type::kU32:
      return Type::kU64;
    case Type::kS32:
      return Type::kS64;
    default:
      throw Unsupported("wide product of this type");
  }
}

void decode_mul(Decoder& decoder) {
  if (has_float_type(decoder)) return decode_float(decoder, LaneOp::kMulLo, 2);
  const int half = decoder.take_any({"lo", "hi", "wide"});
  const Type type = decoder.take_type();
  const LaneOp op = half == 2 ? LaneOp::kMulWide : half == 1 ? LaneOp::kMulHi : LaneOp::kMulLo;
  decode_binary(decoder, decoder.isa.lanes({op, type}), type, half == 2 ? wide_of(type) : type);
}

struct MadSaturated {  // mad.hi.sat.s32
  static int32_t apply(int32_t a, int32_t b, int32_t c) {
    return AddSaturated::apply(MulHi::apply(a, b), c);
  }
};

void decode_mad(Decoder& decoder) {
  if (has_float_type(decoder)) return decode_float(decoder, LaneOp::kFma, 3);
  if (decoder.take("cc")) return decode_mad_carry(decoder, false, true);
  const int half = decoder.take_any({"lo", "hi", "wide"});
  const bool saturate = decoder.take("sat");
  const Type type = decoder.take_type();
  if (saturate) {
    if (half != 1 || type != Type::kS32) throw Unsupported("saturation of this form");
    return decode_ternary(decoder, run_ternary<MadSaturated, int32_t, int32_t>, type, type);
  }
  const LaneOp op = half == 2 ? LaneOp::kMadWide : half == 1 ? LaneOp::kMadHi : LaneOp::kMadLo;
  decode_ternary(decoder, decoder.isa.lanes({op, type}), type, half == 2 ? wide_of(type) : type);
}

void decode_madc(Decoder& decoder) { decode_mad_carry(decoder, true, decoder.take("cc")); }

void decode_fma(Decoder& decoder) {
  const bool relu = decoder.take("relu");
  decode_float(decoder, LaneOp::kFma, 3, relu);
}

void decode_min(Decoder& decoder) { decode_min_max(decoder, LaneOp::kMin); }
void decode_max(Decoder& decoder) { decode_min_max(decoder, LaneOp::kMax); }

void decode_sign(Decoder& decoder, LaneOp op) {
  const bool ftz = decoder.take("ftz");
  const Type type = decoder.take_type();
  if (is_half(type)) return decode_half(decoder, op, type, {.flush = ftz});
  decode_unary(decoder, decoder.isa.lanes({op, type, ftz}), type, type);
}

void decode_abs(Decoder& decoder) { decode_sign(decoder, LaneOp::kAbs); }
void decode_neg(Decoder& decoder) { decode_sign(decoder, LaneOp::kNeg); }

void decode_div(Decoder& decoder) {
  if (!has_float_type(decoder)) {
    const Type type = decoder.take_type();
    return decode_binary(decoder, integer_binary<Quotient>(type), type, type);
  }
  decoder.take_any({"approx", "full"});  // correctly rounded: within 2 ulp
  decode_float(decoder, LaneOp::kDiv, 2);
  decoder.out.counter_class = InstructionClass::kSpecialFunction;
}

void decode_rem(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_binary(decoder, integer_binary<Remainder>(type), type, type);
}

constexpr Form kForms[] = {
    {"add", decode_add}, {"sub", decode_sub}, {"addc", decode_addc}, {"subc", decode_subc},
    {"mul", decode_mul}, {"mad", decode_mad}, {"madc", decode_madc}, {"fma", decode_fma},
    {"min", decode_min}, {"max", decode_max}, {"abs", decode_abs},   {"neg", decode_neg},
    {"div", decode_div}, {"rem", decode_rem},
};

void set_common(Decoder& decoder, Handler handler, Type from) {
  if (!handler) throw Unsupported("operation of this type");
  decoder.out.run = handler;
  decoder.out.type = from;
  decoder.out.counter_class =
      is_float(from) ? InstructionClass::kFloat : InstructionClass::kInteger;
}

}  // namespace

bool is_half(Type type) {
  return type == Type::kF16 || type == Type::kF16x2 || type == Type::kBf16 || type == Type::kBf16x2;
}

void decode_unary(Decoder& decoder, Handler handler, Type from, Type to) {
  set_common(decoder, handler, from);
  decoder.out.d = decoder.destination(0, size_of(to));
  decoder.out.a = decoder.source(1, from);
}

void decode_binary(Decoder& decoder, Handler handler, Type from, Type to) {
  if (decoder.operands() != 3) throw Unsupported("not three operands");
  decode_unary(decoder, handler, from, to);
  decoder.out.b = decoder.source(2, from);
}

void decode_ternary(Decoder& decoder, Handler handler, Type from, Type to) {
  if (decoder.operands() != 4) throw Unsupported("not four operands");
  decode_unary(decoder, handler, from, to);
  decoder.out.b = decoder.source(2, from);
  decoder.out.c = decoder.source(3, to);
}

std::span<const Form> arithmetic_forms() { return kForms; }

}  // namespace gpu_emulator::exec
