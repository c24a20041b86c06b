// Handlers of the ALU. Included by isa_*.cpp in the namespace of one instruction set, compiled with
// its flags; the compiler vectorises the loops over the 32 lanes. No #pragma once: one copy an
// instruction set. Nothing here may call inline functions of other headers that do real work, as
// the linker could keep the copy made for a newer instruction set.

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

template <Compare kCompare, class T, bool kFtz>
Step run_setp(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t result = compare_lanes<T, kFtz>(kCompare, warp, in);
  set_predicates(warp, in, mask, result, ~result);
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
