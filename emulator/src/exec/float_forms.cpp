// Special functions and relatives of floats (PTX 9.7.3): rcp, sqrt, rsqrt, ex2, lg2, sin, cos,
// tanh, copysign, testp.

#include <cmath>
#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

#include "lane_access.inc.h"

using ptx::Type;

void decode_special(Decoder& decoder, LaneOp op) {
  constexpr Rounding kModes[] = {Rounding::kNearest, Rounding::kNearest, Rounding::kZero,
                                 Rounding::kDown, Rounding::kUp};
  const int mode = decoder.take_any({"approx", "rn", "rz", "rm", "rp"});
  const bool ftz = decoder.take("ftz");
  const Type type = decoder.take_type();
  if (is_half(type)) {
    decode_half(decoder, op, type, {.flush = ftz});
  } else if (mode >= 2) {
    decode_unary(decoder, rounded_handler(op, type, ftz, false), type, type);
    make_options<RoundingOptions>(decoder.out).rounding = kModes[mode];
  } else {
    decode_unary(decoder, decoder.isa.lanes({op, type, ftz}), type, type);
  }
  decoder.out.counter_class = InstructionClass::kSpecialFunction;
}

void decode_rcp(Decoder& decoder) { decode_special(decoder, LaneOp::kRcp); }
void decode_sqrt(Decoder& decoder) { decode_special(decoder, LaneOp::kSqrt); }
void decode_rsqrt(Decoder& decoder) { decode_special(decoder, LaneOp::kRsqrt); }
void decode_ex2(Decoder& decoder) { decode_special(decoder, LaneOp::kEx2); }
void decode_lg2(Decoder& decoder) { decode_special(decoder, LaneOp::kLg2); }
void decode_sin(Decoder& decoder) { decode_special(decoder, LaneOp::kSin); }
void decode_cos(Decoder& decoder) { decode_special(decoder, LaneOp::kCos); }
void decode_tanh(Decoder& decoder) { decode_special(decoder, LaneOp::kTanh); }

struct CopySign {  // the sign of a with the magnitude of b
  template <class T>
  static T apply(T a, T b) {
    return std::copysign(b, a);
  }
};

void decode_copysign(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_binary(decoder,
                type == Type::kF64 ? run_binary<CopySign, double, double>
                                   : run_binary<CopySign, float, float>,
                type, type);
}

using enum TestProperty;

template <class T>
Step run_testp(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<T>>(in.a);
  const TestProperty property = options<TestOptions>(in).property;
  uint32_t result = 0;
  for_each_lane(mask, [&](int i) {
    const int kind = std::fpclassify(unpack<T>(a[i]));
    bool holds = false;
    switch (property) {
      case kFinite:
        holds = kind != FP_NAN && kind != FP_INFINITE;
        break;
      case kInfinite:
        holds = kind == FP_INFINITE;
        break;
      case kNumber:
        holds = kind != FP_NAN;
        break;
      case kNotANumber:
        holds = kind == FP_NAN;
        break;
      case kNormal:
        holds = kind == FP_NORMAL;
        break;
      default:
        holds = kind == FP_SUBNORMAL;
        break;
    }
    result |= static_cast<uint32_t>(holds) << i;
  });
  warp.set_predicate(in.d, mask, result);
  return Step::kNext;
}

void decode_testp(Decoder& decoder) {
  const int property =
      decoder.take_any({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  if (property < 0) throw Unsupported("no property");
  const Type type = decoder.take_type();
  make_options<TestOptions>(decoder.out).property = static_cast<TestProperty>(property);
  decoder.out.d = decoder.destination(0, 0);
  decoder.out.a = decoder.source(1, type);
  decoder.out.run = type == Type::kF64 ? run_testp<double> : run_testp<float>;
  decoder.out.counter_class = InstructionClass::kCompare;
}

constexpr Form kForms[] = {
    {"rcp", decode_rcp},     {"sqrt", decode_sqrt}, {"rsqrt", decode_rsqrt},
    {"ex2", decode_ex2},     {"lg2", decode_lg2},   {"sin", decode_sin},
    {"cos", decode_cos},     {"tanh", decode_tanh}, {"copysign", decode_copysign},
    {"testp", decode_testp},
};

}  // namespace

std::span<const Form> float_forms() { return kForms; }

}  // namespace gpu_emulator::exec
