// Lane loops of the ALU. Included by isa_*.cpp in the namespace of one instruction set, compiled
// with its flags; the compiler vectorises the loops over the 32 lanes. No #pragma once: one copy an
// instruction set. Nothing here may call inline functions of other headers that do real work, as
// the linker could keep the copy made for a newer instruction set.

// ---------------------------------------------------------------------------------------- integer

template <class T>
using Unsigned = std::make_unsigned_t<std::conditional_t<(sizeof(T) < 4), int32_t, T>>;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
      return a + b;
    else
      return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
      return a - b;
    else
      return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
struct Mul {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
      return a * b;
    else
      return static_cast<T>(Unsigned<T>(a) * Unsigned<T>(b));
  }
};
template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};

struct MulHi {
  template <class T>
  static T apply(T a, T b) {
    using W = typename Wider<T>::type;
    return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
  }
};
struct MulWide {
  template <class T>
  static auto apply(T a, T b) {
    using W = typename Wider<T>::type;
    return static_cast<W>(static_cast<W>(a) * static_cast<W>(b));
  }
};
struct MadLo {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(Mul::apply(a, b), c);
  }
};
struct MadHi {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(MulHi::apply(a, b), c);
  }
};
struct MadWide {
  template <class T, class W>
  static W apply(T a, T b, W c) {
    return Add::apply(MulWide::apply(a, b), c);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Abs {
  template <class T>
  static T apply(T a) {
    return a < 0 ? static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a)) : a;
  }
};
struct Neg {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
  }
};
struct And {
  template <class T>
  static T apply(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  static T apply(T a) {
    return a == 0;
  }
};
struct Identity {
  template <class T>
  static T apply(T a) {
    return a;
  }
};
struct Shl {
  template <class T>
  static T apply(T a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    return n >= kBits ? T(0) : static_cast<T>(a << (n & (kBits - 1)));
  }
};
struct Shr {
  template <class T>
  static T apply(T a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    if constexpr (std::is_signed_v<T>) {
      return static_cast<T>(a >> (n >= kBits ? kBits - 1 : n));
    } else {
      return n >= kBits ? T(0) : static_cast<T>(a >> (n & (kBits - 1)));
    }
  }
};

Step run_lop3(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  uint32_t term[8];  // all ones where the table has a one
  for (int k = 0; k < 8; ++k) term[k] = 0u - static_cast<uint32_t>(in.imm >> k & 1);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    const uint32_t x = a[i], y = b[i], z = c[i];
    const uint32_t not_x =
        (~y & ((~z & term[0]) | (z & term[1]))) | (y & ((~z & term[2]) | (z & term[3])));
    const uint32_t with_x =
        (~y & ((~z & term[4]) | (z & term[5]))) | (y & ((~z & term[6]) | (z & term[7])));
    return (~x & not_x) | (x & with_x);
  });
  return Step::kNext;
}

template <class C>
Step run_select(Warp& warp, const Instruction& in, uint32_t mask) {
  const C* a = warp.lanes<C>(in.a);
  const C* b = warp.lanes<C>(in.b);
  const uint32_t p = warp.predicate(in.c);
  write_lanes<C>(warp, in.d, mask, [=](int i) { return (p >> i & 1) ? a[i] : b[i]; });
  return Step::kNext;
}

// ------------------------------------------------------------------------------------------ float

inline float flush(float x) {  // subnormals to zero of the same sign
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return __builtin_bit_cast(float, (bits & 0x7f800000u) ? bits : bits & 0x80000000u);
}
inline float saturated(float x) {  // [0, 1]; NaN becomes +0
  const float low = x > 0.0f ? x : 0.0f;
  return low > 1.0f ? 1.0f : low;
}

template <class Op>
struct Ftz {
  template <class... Args>
  static float apply(Args... args) {
    return flush(Op::apply(flush(args)...));
  }
};
template <class Op>
struct Saturated {
  template <class... Args>
  static float apply(Args... args) {
    return saturated(Op::apply(args...));
  }
};

// min and max of floats: a NaN loses, -0 < +0 (PTX 9.7.3.11).
struct FloatMin {
  template <class T>
  static T apply(T a, T b) {
    using C = Container<T>;
    const T zero = __builtin_bit_cast(T, __builtin_bit_cast(C, a) | __builtin_bit_cast(C, b));
    const T less = a < b ? a : b;
    const T ordered = a == b ? zero : less;
    return a != a ? b : (b != b ? a : ordered);
  }
};
struct FloatMax {
  template <class T>
  static T apply(T a, T b) {
    using C = Container<T>;
    const T zero = __builtin_bit_cast(T, __builtin_bit_cast(C, a) & __builtin_bit_cast(C, b));
    const T more = a > b ? a : b;
    const T ordered = a == b ? zero : more;
    return a != a ? b : (b != b ? a : ordered);
  }
};
struct FloatAbs {
  template <class T>
  static T apply(T a) {
    constexpr Container<T> kSign = Container<T>(1) << (8 * sizeof(T) - 1);
    return __builtin_bit_cast(T, __builtin_bit_cast(Container<T>, a) & ~kSign);
  }
};
struct FloatNeg {
  template <class T>
  static T apply(T a) {
    constexpr Container<T> kSign = Container<T>(1) << (8 * sizeof(T) - 1);
    return __builtin_bit_cast(T, __builtin_bit_cast(Container<T>, a) ^ kSign);
  }
};
struct Fma {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Div {
  template <class T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct Rcp {
  template <class T>
  static T apply(T a) {
    return T(1) / a;
  }
};
struct Sqrt {
  static float apply(float a) { return __builtin_sqrtf(a); }
  static double apply(double a) { return __builtin_sqrt(a); }
};
struct Rsqrt {
  // Correctly rounded twice: within 2 ulp; PTX allows a relative error of 2^-22.9.
  static float apply(float a) {
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a)));
  }
  static double apply(double a) { return 1.0 / __builtin_sqrt(a); }
};

// 2^x: 2^n of the nearest integer n, times a degree-6 minimax polynomial on [-1/2, 1/2]. Error
// below 2 ulp, the bound that PTX 9.7.3.22 gives for ex2.approx.
struct Ex2 {
  static float apply(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float low = x < -150.0f ? -150.0f : x;
    const float clamped = low > 129.0f ? 129.0f : low;
    const float rounded = clamped + kRound;
    const float t = clamped - (rounded - kRound);
    const int32_t n = __builtin_bit_cast(int32_t, rounded) - 0x4B400000;
    float p = 1.5353362e-4f;
    p = p * t + 1.3398874e-3f;
    p = p * t + 9.6184373e-3f;
    p = p * t + 5.5503324e-2f;
    p = p * t + 0.24022648f;
    p = p * t + 0.69314720f;
    p = p * t + 1.0f;
    const int32_t half = n >> 1;  // two factors, so that subnormal results come out
    const float scale0 = __builtin_bit_cast(float, (half + 127) << 23);
    const float scale1 = __builtin_bit_cast(float, (n - half + 127) << 23);
    const float result = p * scale0 * scale1;
    return x != x ? x : (x < -150.0f ? 0.0f : result);
  }
};
struct Lg2 {
  static float apply(float a) { return __builtin_log2f(a); }
};
struct Sin {
  static float apply(float a) { return __builtin_sinf(a); }
};
struct Cos {
  static float apply(float a) { return __builtin_cosf(a); }
};
struct Tanh {
  static float apply(float a) { return __builtin_tanhf(a); }
};

// ------------------------------------------------------------------------------------- comparison

template <Compare kCompare, class T>
inline bool compare(T a, T b) {
  switch (kCompare) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a < b || a > b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
    case Compare::kEqu:
      return !(a < b || a > b);
    case Compare::kNeu:
      return !(a == b);
    case Compare::kLtu:
      return !(a >= b);
    case Compare::kLeu:
      return !(a > b);
    case Compare::kGtu:
      return !(a <= b);
    case Compare::kGeu:
      return !(a < b);
    case Compare::kNum:
      return a == a && b == b;
    case Compare::kNan:
      return !(a == a && b == b);
  }
  return false;
}

// option[0]: 0 none, 1 and, 2 or, 3 xor with predicate c; option[1]: c negated.
inline uint32_t combine(const Instruction& in, uint32_t value, uint32_t with) {
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

template <Compare kCompare, class T, bool kFtz>
Step run_setp(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<T>>(in.a);
  const auto* b = warp.lanes<Container<T>>(in.b);
  uint32_t result = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    T x = unpack<T>(a[i]), y = unpack<T>(b[i]);
    if constexpr (kFtz) x = flush(x), y = flush(y);
    result |= static_cast<uint32_t>(compare<kCompare>(x, y)) << i;
  }
  uint32_t with = in.option[0] ? warp.predicate(in.c) : 0;
  if (in.option[1]) with = ~with;
  if (in.d != kNoSlot) warp.set_predicate(in.d, mask, combine(in, result, with));
  if (in.e != kNoSlot) warp.set_predicate(in.e, mask, combine(in, ~result, with));
  return Step::kNext;
}

// ------------------------------------------------------------------------- conversions and packing

inline uint32_t bf16_bits(float x) {  // nearest even; NaN becomes the canonical one
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded;
}

Step run_pack_bf16x2(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* high = warp.lanes<uint32_t>(in.a);
  const auto* low = warp.lanes<uint32_t>(in.b);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    return bf16_bits(unpack<float>(high[i])) << 16 | bf16_bits(unpack<float>(low[i]));
  });
  return Step::kNext;
}

// f32 to f16, nearest even, in integer arithmetic that vectorises on every instruction set.
inline uint32_t f16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14: adding 1/2 leaves the subnormal result, rounded, in the low bits.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude >= 0x47800000u ? overflow : finite;
  return magnitude > 0x7f800000u ? 0x7fffu : (sign | result);
}

Step run_pack_f16x2(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* high = warp.lanes<uint32_t>(in.a);
  const auto* low = warp.lanes<uint32_t>(in.b);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    return f16_bits(unpack<float>(high[i])) << 16 | f16_bits(unpack<float>(low[i]));
  });
  return Step::kNext;
}

template <class From>
Step run_widen(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  using Wide = std::conditional_t<std::is_signed_v<From>, int64_t, uint64_t>;
  write_lanes<uint64_t>(warp, in.d, mask, [=](int i) {
    return static_cast<uint64_t>(static_cast<Wide>(static_cast<From>(a[i])));
  });
  return Step::kNext;
}

Step run_narrow(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint64_t>(in.a);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) { return static_cast<uint32_t>(a[i]); });
  return Step::kNext;
}

Step run_pack_2x32(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  write_lanes<uint64_t>(warp, in.d, mask,
                        [=](int i) { return static_cast<uint64_t>(b[i]) << 32 | a[i]; });
  return Step::kNext;
}

Step run_unpack_2x32(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t copy[kWarpSize];
  const auto* a = warp.lanes<uint64_t>(in.a);
  for (int i = 0; i < kWarpSize; ++i) copy[i] = a[i];
  if (in.d != kNoSlot) {
    write_lanes<uint32_t>(warp, in.d, mask, [&](int i) { return static_cast<uint32_t>(copy[i]); });
  }
  if (in.e != kNoSlot) {
    write_lanes<uint32_t>(warp, in.e, mask,
                          [&](int i) { return static_cast<uint32_t>(copy[i] >> 32); });
  }
  return Step::kNext;
}

Step run_pack_2x16(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) { return b[i] << 16 | (a[i] & 0xffff); });
  return Step::kNext;
}

Step run_unpack_2x16(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t copy[kWarpSize];
  const auto* a = warp.lanes<uint32_t>(in.a);
  for (int i = 0; i < kWarpSize; ++i) copy[i] = a[i];
  if (in.d != kNoSlot) {
    write_lanes<uint32_t>(warp, in.d, mask, [&](int i) { return copy[i] & 0xffff; });
  }
  if (in.e != kNoSlot) {
    write_lanes<uint32_t>(warp, in.e, mask, [&](int i) { return copy[i] >> 16; });
  }
  return Step::kNext;
}

// ------------------------------------------------------------------------------------ the handlers

template <class Op>
Handler signed_binary(ptx::Type type) {
  switch (type) {
    case ptx::Type::kS16:
      return run_binary<Op, int16_t, int16_t>;
    case ptx::Type::kB16:
    case ptx::Type::kU16:
      return run_binary<Op, uint16_t, uint16_t>;
    case ptx::Type::kS32:
      return run_binary<Op, int32_t, int32_t>;
    case ptx::Type::kB32:
    case ptx::Type::kU32:
      return run_binary<Op, uint32_t, uint32_t>;
    case ptx::Type::kS64:
      return run_binary<Op, int64_t, int64_t>;
    case ptx::Type::kB64:
    case ptx::Type::kU64:
      return run_binary<Op, uint64_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class Op>
Handler bits_binary(ptx::Type type) {  // where signedness does not matter
  switch (ptx::type_bytes(type)) {
    case 2:
      return run_binary<Op, uint16_t, uint16_t>;
    case 4:
      return run_binary<Op, uint32_t, uint32_t>;
    case 8:
      return run_binary<Op, uint64_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class Op>
Handler bits_unary(ptx::Type type) {
  switch (ptx::type_bytes(type)) {
    case 1:
    case 2:
      return run_unary<Op, uint16_t, uint16_t>;
    case 4:
      return run_unary<Op, uint32_t, uint32_t>;
    case 8:
      return run_unary<Op, uint64_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class Op>
Handler signed_ternary(ptx::Type type) {
  switch (type) {
    case ptx::Type::kS16:
      return run_ternary<Op, int16_t, int16_t>;
    case ptx::Type::kU16:
      return run_ternary<Op, uint16_t, uint16_t>;
    case ptx::Type::kS32:
      return run_ternary<Op, int32_t, int32_t>;
    case ptx::Type::kU32:
      return run_ternary<Op, uint32_t, uint32_t>;
    case ptx::Type::kS64:
      return run_ternary<Op, int64_t, int64_t>;
    case ptx::Type::kU64:
      return run_ternary<Op, uint64_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class Op>
Handler shift(ptx::Type type) {
  switch (type) {
    case ptx::Type::kS16:
      return run_shift<Op, int16_t>;
    case ptx::Type::kB16:
    case ptx::Type::kU16:
      return run_shift<Op, uint16_t>;
    case ptx::Type::kS32:
      return run_shift<Op, int32_t>;
    case ptx::Type::kB32:
    case ptx::Type::kU32:
      return run_shift<Op, uint32_t>;
    case ptx::Type::kS64:
      return run_shift<Op, int64_t>;
    case ptx::Type::kB64:
    case ptx::Type::kU64:
      return run_shift<Op, uint64_t>;
    default:
      return nullptr;
  }
}

Handler wide_product(ptx::Type type) {
  switch (type) {
    case ptx::Type::kS16:
      return run_binary<MulWide, int16_t, int32_t>;
    case ptx::Type::kU16:
      return run_binary<MulWide, uint16_t, uint32_t>;
    case ptx::Type::kS32:
      return run_binary<MulWide, int32_t, int64_t>;
    case ptx::Type::kU32:
      return run_binary<MulWide, uint32_t, uint64_t>;
    default:
      return nullptr;
  }
}

Handler wide_mad(ptx::Type type) {
  switch (type) {
    case ptx::Type::kS16:
      return run_ternary<MadWide, int16_t, int32_t>;
    case ptx::Type::kU16:
      return run_ternary<MadWide, uint16_t, uint32_t>;
    case ptx::Type::kS32:
      return run_ternary<MadWide, int32_t, int64_t>;
    case ptx::Type::kU32:
      return run_ternary<MadWide, uint32_t, uint64_t>;
    default:
      return nullptr;
  }
}

template <class Op>
Handler float_unary(const LaneForm& form) {
  if (form.type == ptx::Type::kF64) return nullptr;
  if (form.saturate) {
    return form.ftz ? run_unary<Saturated<Ftz<Op>>, float, float>
                    : run_unary<Saturated<Op>, float, float>;
  }
  return form.ftz ? run_unary<Ftz<Op>, float, float> : run_unary<Op, float, float>;
}

template <class Op>
Handler float_binary(const LaneForm& form) {
  if (form.type == ptx::Type::kF64) return run_binary<Op, double, double>;
  if (form.saturate) {
    return form.ftz ? run_binary<Saturated<Ftz<Op>>, float, float>
                    : run_binary<Saturated<Op>, float, float>;
  }
  return form.ftz ? run_binary<Ftz<Op>, float, float> : run_binary<Op, float, float>;
}

Handler fma_handler(const LaneForm& form) {
  if (form.type == ptx::Type::kF64) return run_ternary<Fma, double, double>;
  if (form.saturate) {
    return form.ftz ? run_ternary<Saturated<Ftz<Fma>>, float, float>
                    : run_ternary<Saturated<Fma>, float, float>;
  }
  return form.ftz ? run_ternary<Ftz<Fma>, float, float> : run_ternary<Fma, float, float>;
}

template <Compare kCompare>
Handler setp_of(const LaneForm& form) {
  switch (form.type) {
    case ptx::Type::kS16:
      return run_setp<kCompare, int16_t, false>;
    case ptx::Type::kB16:
    case ptx::Type::kU16:
      return run_setp<kCompare, uint16_t, false>;
    case ptx::Type::kS32:
      return run_setp<kCompare, int32_t, false>;
    case ptx::Type::kB32:
    case ptx::Type::kU32:
      return run_setp<kCompare, uint32_t, false>;
    case ptx::Type::kS64:
      return run_setp<kCompare, int64_t, false>;
    case ptx::Type::kB64:
    case ptx::Type::kU64:
      return run_setp<kCompare, uint64_t, false>;
    case ptx::Type::kF32:
      return form.ftz ? run_setp<kCompare, float, true> : run_setp<kCompare, float, false>;
    case ptx::Type::kF64:
      return run_setp<kCompare, double, false>;
    default:
      return nullptr;
  }
}

Handler setp_handler(const LaneForm& form) {
  switch (form.compare) {
    case Compare::kEq:
      return setp_of<Compare::kEq>(form);
    case Compare::kNe:
      return setp_of<Compare::kNe>(form);
    case Compare::kLt:
      return setp_of<Compare::kLt>(form);
    case Compare::kLe:
      return setp_of<Compare::kLe>(form);
    case Compare::kGt:
      return setp_of<Compare::kGt>(form);
    case Compare::kGe:
      return setp_of<Compare::kGe>(form);
    case Compare::kEqu:
      return setp_of<Compare::kEqu>(form);
    case Compare::kNeu:
      return setp_of<Compare::kNeu>(form);
    case Compare::kLtu:
      return setp_of<Compare::kLtu>(form);
    case Compare::kLeu:
      return setp_of<Compare::kLeu>(form);
    case Compare::kGtu:
      return setp_of<Compare::kGtu>(form);
    case Compare::kGeu:
      return setp_of<Compare::kGeu>(form);
    case Compare::kNum:
      return setp_of<Compare::kNum>(form);
    case Compare::kNan:
      return setp_of<Compare::kNan>(form);
  }
  return nullptr;
}

inline bool is_float_type(ptx::Type type) {
  return type == ptx::Type::kF32 || type == ptx::Type::kF64;
}

Handler arithmetic_handler(const LaneForm& form) {
  const bool is_float = is_float_type(form.type);
  const bool is_double = form.type == ptx::Type::kF64;
  switch (form.op) {
    case LaneOp::kAdd:
      return is_float ? float_binary<Add>(form) : bits_binary<Add>(form.type);
    case LaneOp::kSub:
      return is_float ? float_binary<Sub>(form) : bits_binary<Sub>(form.type);
    case LaneOp::kMulLo:
      return is_float ? float_binary<Mul>(form) : bits_binary<Mul>(form.type);
    case LaneOp::kMulHi:
      return signed_binary<MulHi>(form.type);
    case LaneOp::kMulWide:
      return wide_product(form.type);
    case LaneOp::kMadLo:
      return signed_ternary<MadLo>(form.type);
    case LaneOp::kMadHi:
      return signed_ternary<MadHi>(form.type);
    case LaneOp::kMadWide:
      return wide_mad(form.type);
    case LaneOp::kMin:
      return is_float ? float_binary<FloatMin>(form) : signed_binary<Min>(form.type);
    case LaneOp::kMax:
      return is_float ? float_binary<FloatMax>(form) : signed_binary<Max>(form.type);
    case LaneOp::kAbs:
      if (is_double) return run_unary<FloatAbs, double, double>;
      if (is_float) return float_unary<FloatAbs>(form);
      return form.type == ptx::Type::kS16   ? run_unary<Abs, int16_t, int16_t>
             : form.type == ptx::Type::kS32 ? run_unary<Abs, int32_t, int32_t>
                                            : run_unary<Abs, int64_t, int64_t>;
    case LaneOp::kNeg:
      if (is_double) return run_unary<FloatNeg, double, double>;
      return is_float ? float_unary<FloatNeg>(form) : bits_unary<Neg>(form.type);
    case LaneOp::kFma:
      return fma_handler(form);
    case LaneOp::kDiv:
      return is_float ? float_binary<Div>(form) : nullptr;
    case LaneOp::kSqrt:
      return is_double ? run_unary<Sqrt, double, double> : float_unary<Sqrt>(form);
    case LaneOp::kRsqrt:
      return is_double ? run_unary<Rsqrt, double, double> : float_unary<Rsqrt>(form);
    case LaneOp::kRcp:
      return is_double ? run_unary<Rcp, double, double> : float_unary<Rcp>(form);
    case LaneOp::kEx2:
      return float_unary<Ex2>(form);
    case LaneOp::kLg2:
      return float_unary<Lg2>(form);
    case LaneOp::kSin:
      return float_unary<Sin>(form);
    case LaneOp::kCos:
      return float_unary<Cos>(form);
    case LaneOp::kTanh:
      return float_unary<Tanh>(form);
    default:
      return nullptr;
  }
}

Handler logic_handler(const LaneForm& form) {
  switch (form.op) {
    case LaneOp::kAnd:
      return bits_binary<And>(form.type);
    case LaneOp::kOr:
      return bits_binary<Or>(form.type);
    case LaneOp::kXor:
      return bits_binary<Xor>(form.type);
    case LaneOp::kNot:
      return bits_unary<Not>(form.type);
    case LaneOp::kCnot:
      return bits_unary<Cnot>(form.type);
    case LaneOp::kShl:
      return shift<Shl>(form.type);
    case LaneOp::kShr:
      return shift<Shr>(form.type);
    case LaneOp::kLop3:
      return run_lop3;
    case LaneOp::kMov:
      return bits_unary<Identity>(form.type);
    case LaneOp::kSelect:
      return ptx::type_bytes(form.type) == 8 ? run_select<uint64_t> : run_select<uint32_t>;
    case LaneOp::kPackBf16x2:
      return run_pack_bf16x2;
    case LaneOp::kPackF16x2:
      return run_pack_f16x2;
    case LaneOp::kWiden:
      switch (form.type) {
        case ptx::Type::kS8:
          return run_widen<int8_t>;
        case ptx::Type::kU8:
          return run_widen<uint8_t>;
        case ptx::Type::kS16:
          return run_widen<int16_t>;
        case ptx::Type::kU16:
          return run_widen<uint16_t>;
        case ptx::Type::kS32:
          return run_widen<int32_t>;
        default:
          return run_widen<uint32_t>;
      }
    case LaneOp::kNarrow:
      return run_narrow;
    case LaneOp::kPack2x32:
      return run_pack_2x32;
    case LaneOp::kUnpack2x32:
      return run_unpack_2x32;
    case LaneOp::kPack2x16:
      return run_pack_2x16;
    case LaneOp::kUnpack2x16:
      return run_unpack_2x16;
    default:
      return nullptr;
  }
}

Handler find_lanes(const LaneForm& form) {
  if (form.op == LaneOp::kSetp) return setp_handler(form);
  if (Handler handler = arithmetic_handler(form)) return handler;
  return logic_handler(form);
}
