// cvt, cvt.pack (PTX 9.7.9.21).

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

#include "lane_access.inc.h"

using ptx::Type;

RoundTo round_to(const Instruction& in) {
  const ConvertOptions how = options<ConvertOptions>(in);
  return {how.rounding, how.away_from_ties, how.saturate_to_finite};
}

long double to_integer(long double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero:
      return std::trunc(x);
    case Rounding::kDown:
      return std::floor(x);
    case Rounding::kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

long double float_of(const Instruction& in, uint64_t bits) {
  switch (in.from) {
    case Type::kF16:
      return f16_to_float(static_cast<uint32_t>(bits));
    case Type::kBf16:
      return bf16_to_float(static_cast<uint32_t>(bits));
    case Type::kF64:
      return __builtin_bit_cast(double, bits);
    default: {
      const float x = __builtin_bit_cast(float, static_cast<uint32_t>(bits));
      return options<ConvertOptions>(in).flush ? flushed(x) : x;
    }
  }
}

int64_t signed_of(Type type, uint64_t bits) {
  switch (size_of(type)) {
    case 1:
      return static_cast<int8_t>(bits);
    case 2:
      return static_cast<int16_t>(bits);
    case 4:
      return static_cast<int32_t>(bits);
    default:
      return static_cast<int64_t>(bits);
  }
}

uint64_t unsigned_of(Type type, uint64_t bits) {
  const int size = size_of(type);
  return size == 8 ? bits : bits & ((uint64_t{1} << (8 * size)) - 1);
}

// The nearest representable integer of the type; NaN gives 0.
uint64_t clamp_to(Type type, long double x) {
  if (std::isnan(x)) return 0;
  const int bits = 8 * size_of(type);
  const long double low = is_signed(type) ? -std::ldexp(1.0L, bits - 1) : 0;
  const long double high = std::ldexp(1.0L, is_signed(type) ? bits - 1 : bits) - 1;
  const long double clamped = std::clamp(x, low, high);
  return is_signed(type) ? static_cast<uint64_t>(static_cast<int64_t>(clamped))
                         : static_cast<uint64_t>(clamped);
}

uint64_t to_float_type(const Instruction& in, long double x) {
  const ConvertOptions how = options<ConvertOptions>(in);
  const RoundTo rounding = round_to(in);
  if (how.relu && x < 0) x = 0;
  if (how.saturate) x = std::isnan(x) ? 0 : std::clamp(x, 0.0L, 1.0L);
  switch (in.type) {
    case Type::kF16:
      return to_small(x, kF16Format, rounding);
    case Type::kBf16:
      return to_small(x, kBf16Format, rounding);
    case Type::kF64:
      return __builtin_bit_cast(uint64_t, static_cast<double>(x));
    default: {
      const uint32_t bits = to_small(x, kF32Format, rounding);
      const bool subnormal = !(bits & 0x7f800000);
      return how.flush && subnormal ? bits & 0x80000000 : bits;
    }
  }
}

uint64_t convert(const Instruction& in, uint64_t bits) {
  const ConvertOptions how = options<ConvertOptions>(in);
  if (is_float(in.from)) {
    long double x = float_of(in, bits);
    const bool to_int = !is_float(in.type);
    if (to_int || how.to_integer) x = to_integer(x, how.rounding);
    return to_int ? clamp_to(in.type, x) : to_float_type(in, x);
  }
  const bool is_negative = is_signed(in.from) && signed_of(in.from, bits) < 0;
  const long double value = is_signed(in.from)
                                ? static_cast<long double>(signed_of(in.from, bits))
                                : static_cast<long double>(unsigned_of(in.from, bits));
  if (is_float(in.type)) return to_float_type(in, value);
  if (how.saturate) return clamp_to(in.type, value);
  const uint64_t extended =
      is_negative ? static_cast<uint64_t>(signed_of(in.from, bits)) : unsigned_of(in.from, bits);
  return is_signed(in.type) ? static_cast<uint64_t>(signed_of(in.type, extended))
                            : unsigned_of(in.type, extended);
}

Step run_convert(Warp& warp, const Instruction& in, uint32_t mask) {
  const ConvertOptions how = options<ConvertOptions>(in);
  for_each_lane(mask, [&](int lane) {
    const uint64_t bits =
        how.from_bytes == 8 ? warp.lanes<uint64_t>(in.a)[lane] : warp.lanes<uint32_t>(in.a)[lane];
    const uint64_t result = convert(in, bits);
    if (how.to_bytes == 8) {
      warp.lanes<uint64_t>(in.d)[lane] = result;
    } else {
      warp.lanes<uint32_t>(in.d)[lane] =
          static_cast<uint32_t>(how.to_bytes == 2 ? result & 0xffff : result);
    }
  });
  return Step::kNext;
}

// ---------------------------------------------------------------------- two values in one register

struct PairFormat {
  const char* name;
  SmallFormat format;
  int bits;
};
constexpr PairFormat kPairs[] = {  // by PairType
    {"bf16x2", kBf16Format, 16},
    {"f16x2", kF16Format, 16},
    {"e4m3x2", kE4m3Format, 8},
    {"e5m2x2", kE5m2Format, 8}};

uint32_t narrow_pair(const Instruction& in, float high, float low) {
  const ConvertOptions how = options<ConvertOptions>(in);
  const PairFormat& pair = kPairs[static_cast<int>(how.pair)];
  const auto one = [&](float x) {
    if (how.flush) x = flushed(x);
    if (how.relu && x < 0) x = 0;
    return to_small(x, pair.format, round_to(in));
  };
  return one(high) << pair.bits | one(low);
}

Step run_pair_of_f32(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* high = warp.lanes<uint32_t>(in.a);
  const auto* low = warp.lanes<uint32_t>(in.b);
  write_lanes<uint32_t>(warp, in.d, mask, [=, &in](int i) {
    return narrow_pair(in, unpack<float>(high[i]), unpack<float>(low[i]));
  });
  return Step::kNext;
}

Step run_pair_of_f16x2(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  write_lanes<uint32_t>(warp, in.d, mask, [=, &in](int i) {
    return narrow_pair(in, f16_to_float(a[i] >> 16), f16_to_float(a[i] & 0xffff));
  });
  return Step::kNext;
}

Step run_f16x2_of_fp8(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const ConvertOptions how = options<ConvertOptions>(in);
  const bool e4m3 = how.pair == PairType::kE4m3x2;
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    const auto half = [&](uint32_t bits) {
      float x = e4m3 ? e4m3_to_float(bits) : e5m2_to_float(bits);
      if (how.relu && x < 0) x = 0;
      return to_small(x, kF16Format, {});
    };
    return half(a[i] >> 8 & 0xff) << 16 | half(a[i] & 0xff);
  });
  return Step::kNext;
}

Step run_tf32(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const bool relu = options<ConvertOptions>(in).relu;
  write_lanes<uint32_t>(warp, in.d, mask, [=, &in](int i) {
    float x = unpack<float>(a[i]);
    if (relu && x < 0) x = 0;
    return to_small(x, kTf32Format, round_to(in)) << 13;
  });
  return Step::kNext;
}

// ---------------------------------------------------------------------------------------- decoding

void take_rounding(Decoder& decoder) {
  ConvertOptions& how = make_options<ConvertOptions>(decoder.out);
  constexpr Rounding kModes[] = {Rounding::kNearest, Rounding::kZero, Rounding::kDown,
                                 Rounding::kUp};
  const int integer = decoder.take_any({"rni", "rzi", "rmi", "rpi"});
  const int mode = integer >= 0 ? integer : decoder.take_any({"rn", "rz", "rm", "rp"});
  if (mode >= 0) how.rounding = kModes[mode];
  how.to_integer = integer >= 0;
  how.away_from_ties = decoder.take("rna");
  how.saturate = decoder.take("sat");
  how.flush = decoder.take("ftz");
  how.relu = decoder.take("relu");
  how.saturate_to_finite = decoder.take("satfinite");
}

bool is_plain(const ConvertOptions& how) {
  return !how.to_integer && !how.away_from_ties && !how.saturate && !how.flush && !how.relu &&
         !how.saturate_to_finite;
}

int take_pair(Decoder& decoder) {  // the PairType, -1 = none
  return decoder.take_any({kPairs[0].name, kPairs[1].name, kPairs[2].name, kPairs[3].name});
}

// Two f32, or an f16x2, to a pair; or fp8 pairs to f16x2.
void decode_pair(Decoder& decoder, int first) {
  Instruction& out = decoder.out;
  ConvertOptions& how = make_options<ConvertOptions>(out);
  const int second = take_pair(decoder);
  if (second < 0) {
    if (!decoder.take("f32")) throw Unsupported("conversion of these types");
    how.pair = static_cast<PairType>(first);
    out.d = decoder.destination(0, kPairs[first].bits / 4);
    out.a = decoder.source(1, Type::kF32);
    out.b = decoder.source(2, Type::kF32);
    const LaneOp plain = first == 0 ? LaneOp::kPackBf16x2 : LaneOp::kPackF16x2;
    const bool is_hot = first < 2 && how.rounding == Rounding::kNearest && is_plain(how);
    out.run = is_hot ? decoder.isa.lanes({plain}) : run_pair_of_f32;
  } else if (first >= 2 && second == 1) {
    how.pair = static_cast<PairType>(first);
    out.d = decoder.destination(0, 2);
    out.a = decoder.source(1, Type::kF16x2);
    out.run = run_pair_of_f16x2;
  } else if (first == 1 && second >= 2) {
    how.pair = static_cast<PairType>(second);
    out.d = decoder.destination(0, 4);
    out.a = decoder.source(1, Type::kB16);
    out.run = run_f16x2_of_fp8;
  } else {
    throw Unsupported("conversion of these types");
  }
}

// Hot forms without rounding: between integers of up to 64 bits.
Handler plain_integer(const Decoder& decoder, Type to, Type from, int register_bytes) {
  if (is_float(to) || is_float(from)) return nullptr;
  if (!is_plain(options<ConvertOptions>(decoder.out))) return nullptr;
  if (size_of(to) == 8 && size_of(from) <= 4) return decoder.isa.lanes({LaneOp::kWiden, from});
  if (size_of(to) == 4 && size_of(from) == 8) return decoder.isa.lanes({LaneOp::kNarrow});
  if (size_of(to) == 4 && size_of(from) == 4 && register_bytes == 4) {
    return decoder.isa.lanes({LaneOp::kMov, Type::kB32});
  }
  return nullptr;
}

void decode_cvt(Decoder& decoder) {
  Instruction& out = decoder.out;
  out.counter_class = InstructionClass::kConvert;
  take_rounding(decoder);
  if (const int pair = take_pair(decoder); pair >= 0) return decode_pair(decoder, pair);
  if (decoder.take("tf32")) {
    if (decoder.take_type() != Type::kF32) throw Unsupported("conversion of these types");
    out.d = decoder.destination(0, 4);
    out.a = decoder.source(1, Type::kF32);
    out.run = run_tf32;
    return;
  }
  out.type = decoder.take_type();
  out.from = decoder.take_type();
  if (size_of(out.type) == 0 || size_of(out.type) > 8 || size_of(out.from) > 8 ||
      size_of(out.from) == 0 || out.type == Type::kF32x2 || out.from == Type::kF32x2) {
    throw Unsupported("conversion of these types");
  }
  const int to_bytes = decoder.register_bytes(decoder.operand(0));
  const int from_bytes = decoder.register_bytes(decoder.operand(1));
  if (to_bytes < std::min(size_of(out.type), 8) && !(to_bytes == 2 && size_of(out.type) == 1)) {
    throw Unsupported("destination too small");
  }
  out.d = decoder.destination(0, to_bytes);
  out.a = decoder.source(1, out.from, true);
  ConvertOptions& how = make_options<ConvertOptions>(out);
  how.to_bytes = static_cast<uint8_t>(to_bytes);
  how.from_bytes = static_cast<uint8_t>(from_bytes < 0 ? size_of(out.from) : from_bytes);
  const bool same_registers = to_bytes == std::max(size_of(out.type), 4) &&
                              how.from_bytes <= std::max(size_of(out.from), 4);
  Handler plain = same_registers ? plain_integer(decoder, out.type, out.from, to_bytes) : nullptr;
  out.run = plain ? plain : run_convert;
}

// cvt.pack.sat: two 32-bit integers, saturated, into one register above the low part of c.
Step run_cvt_pack(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const uint32_t* c = in.c == kNoSlot ? nullptr : warp.lanes<uint32_t>(in.c);
  const int bits = 8 * size_of(in.type);
  const uint32_t ones = (1u << bits) - 1;
  write_lanes<uint32_t>(warp, in.d, mask, [=, &in](int i) {
    const auto part = [&](uint32_t x) {
      return static_cast<uint32_t>(clamp_to(in.type, static_cast<int32_t>(x))) & ones;
    };
    const uint32_t pair = part(a[i]) << bits | part(b[i]);
    return c ? c[i] << (2 * bits) | pair : pair;
  });
  return Step::kNext;
}

void decode_cvt_pack(Decoder& decoder) {
  Instruction& out = decoder.out;
  out.counter_class = InstructionClass::kConvert;
  if (!decoder.take("sat")) throw Unsupported("cvt.pack without sat");
  out.type = decoder.take_type();
  if (size_of(out.type) > 2 || decoder.take_type() != Type::kS32) {
    throw Unsupported("conversion of these types");
  }
  out.d = decoder.destination(0, 4);
  out.a = decoder.source(1, Type::kS32);
  out.b = decoder.source(2, Type::kS32);
  if (decoder.take("b32")) out.c = decoder.source(3, Type::kB32);
  out.run = run_cvt_pack;
}

constexpr Form kForms[] = {
    {"cvt", decode_cvt},
    {"cvt.pack", decode_cvt_pack},
};

}  // namespace

std::span<const Form> convert_forms() { return kForms; }

}  // namespace gpu_emulator::exec
