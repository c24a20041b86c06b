// Operations on the values of one lane, and comparisons of all lanes. Included after
// lane_access.inc.h, in the unnamed namespace of each file that has some: each is compiled with its
// own flags. No #pragma once.

// ----------------------------------------------------------------------------------------- integer

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

// ------------------------------------------------------------------------------------------- float

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

// -------------------------------------------------------------------------------------- comparison

template <class T>
[[gnu::always_inline]] inline bool compare(Compare how, T a, T b) {
  switch (how) {
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

// Of all lanes of operands a and b; bit = lane.
template <class T, bool kFtz>
[[gnu::always_inline]] inline uint32_t compare_lanes(Compare how, const Warp& warp,
                                                     const Instruction& in) {
  const auto* a = warp.lanes<Container<T>>(in.a);
  const auto* b = warp.lanes<Container<T>>(in.b);
  uint32_t result = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    T x = unpack<T>(a[i]), y = unpack<T>(b[i]);
    if constexpr (kFtz) x = flush(x), y = flush(y);
    result |= static_cast<uint32_t>(compare(how, x, y)) << i;
  }
  return result;
}

// Predicate c of a comparison, with which its result is combined.
inline uint32_t combining_predicate(const Warp& warp, const Instruction& in) {
  const CompareOptions& how = options<CompareOptions>(in);
  const uint32_t c = how.combination == Combination::kNone ? 0 : warp.predicate(in.c);
  return how.negated ? ~c : c;
}

inline uint32_t combine(const Instruction& in, uint32_t value, uint32_t with) {
  switch (options<CompareOptions>(in).combination) {
    case Combination::kAnd:
      return value & with;
    case Combination::kOr:
      return value | with;
    case Combination::kXor:
      return value ^ with;
    default:
      return value;
  }
}

// The results of a comparison: predicate d and, where there is one, e.
inline void set_predicates(Warp& warp, const Instruction& in, uint32_t mask, uint32_t d,
                           uint32_t e) {
  const uint32_t with = combining_predicate(warp, in);
  if (in.d != kNoSlot) warp.set_predicate(in.d, mask, combine(in, d, with));
  if (in.e != kNoSlot) warp.set_predicate(in.e, mask, combine(in, e, with));
}
