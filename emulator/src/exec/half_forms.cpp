// Arithmetic of f16, bf16 and the packed types (PTX 9.7.4): each half exactly, then one rounding to
// nearest even.

#include <bit>
#include <cmath>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {

using ptx::Type;

namespace {

using enum HalfOp;

struct HalfType {
  SmallFormat format;
  uint32_t nan;
  bool is_bf16;

  float value(uint32_t bits) const { return is_bf16 ? bf16_to_float(bits) : f16_to_float(bits); }
};
constexpr HalfType kF16 = {kF16Format, 0x7fff, false};
constexpr HalfType kBf16 = {kBf16Format, 0x7fff, true};

uint32_t flushed(const HalfType& type, uint32_t bits) {
  const uint32_t exponent_mask = type.is_bf16 ? 0x7f80 : 0x7c00;
  return bits & exponent_mask ? bits : bits & 0x8000;
}

uint32_t min_or_max(const HalfOptions& how, const HalfType& type, uint32_t a, uint32_t b) {
  const uint32_t sign = how.xorsign_abs ? (a ^ b) & 0x8000 : 0;
  if (how.xorsign_abs) {
    a &= 0x7fff;
    b &= 0x7fff;
  }
  const float x = type.value(a), y = type.value(b);
  if (std::isnan(x) || std::isnan(y)) {
    if (how.nan || (std::isnan(x) && std::isnan(y))) return type.nan;
    return (std::isnan(x) ? b : a) | sign;
  }
  const bool maximum = how.op == kMax;
  if (x == y) return (maximum ? a & b : a | b) | sign;  // -0 < +0
  return ((x > y) == maximum ? a : b) | sign;
}

// x y + z of halves, rounded to odd, so that rounding it again is as rounding the exact sum once.
double fma_to_odd(double x, double y, double z) {
  const double product = x * y;  // exact
  const double sum = product + z;
  const double added = sum - product;
  const double error = (product - (sum - added)) + (z - added);
  const bool is_odd = std::bit_cast<uint64_t>(sum) & 1;
  if (error == 0 || is_odd || !std::isfinite(sum)) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

uint32_t compute(const HalfOptions& how, const HalfType& type, uint32_t a, uint32_t b, uint32_t c) {
  if (how.flush) {
    a = flushed(type, a);
    b = flushed(type, b);
    c = flushed(type, c);
  }
  const double x = type.value(a), y = type.value(b), z = type.value(c);
  double result;
  switch (how.op) {
    case kAdd:
      result = x + y;
      break;
    case kSub:
      result = x - y;
      break;
    case kMul:
      result = x * y;
      break;
    case kFma:
      result = fma_to_odd(x, y, z);
      break;
    case kMin:
    case kMax:
      return min_or_max(how, type, a, b);
    case kNeg:
      return a ^ 0x8000;
    case kAbs:
      return a & 0x7fff;
    case kEx2:
      result = std::exp2(x);
      break;
    default:
      result = std::tanh(x);
      break;
  }
  if (how.saturate) result = result > 0 ? std::fmin(result, 1.0) : 0.0;
  if (how.relu && result < 0) result = 0.0;
  const uint32_t bits = to_small(result, type.format, {});
  return how.flush ? flushed(type, bits) : bits;
}

Step run_half(Warp& warp, const Instruction& in, uint32_t mask) {
  const bool is_bf16 = in.type == Type::kBf16 || in.type == Type::kBf16x2;
  const bool packed = size_of(in.type) == 4;
  const HalfType& type = is_bf16 ? kBf16 : kF16;
  const uint32_t* a = warp.lanes<uint32_t>(in.a);
  const uint32_t* b = in.b == kNoSlot ? a : warp.lanes<uint32_t>(in.b);
  const uint32_t* c = in.c == kNoSlot ? a : warp.lanes<uint32_t>(in.c);
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  const HalfOptions how = options<HalfOptions>(in);
  for_each_lane(mask, [&](int i) {
    const uint32_t low = compute(how, type, a[i] & 0xffff, b[i] & 0xffff, c[i] & 0xffff);
    const uint32_t high = packed ? compute(how, type, a[i] >> 16, b[i] >> 16, c[i] >> 16) : 0;
    d[i] = high << 16 | low;
  });
  return Step::kNext;
}

struct HalfForm {
  LaneOp lane_op;
  HalfOp op;
  void (*decode)(Decoder& decoder, Handler handler, Type from, Type to);
};
constexpr HalfForm kForms[] = {
    {LaneOp::kAdd, kAdd, decode_binary},   {LaneOp::kSub, kSub, decode_binary},
    {LaneOp::kMulLo, kMul, decode_binary}, {LaneOp::kFma, kFma, decode_ternary},
    {LaneOp::kMin, kMin, decode_binary},   {LaneOp::kMax, kMax, decode_binary},
    {LaneOp::kNeg, kNeg, decode_unary},    {LaneOp::kAbs, kAbs, decode_unary},
    {LaneOp::kEx2, kEx2, decode_unary},    {LaneOp::kTanh, kTanh, decode_unary},
};

}  // namespace

void decode_half(Decoder& decoder, LaneOp op, Type type, HalfOptions how) {
  for (const HalfForm& form : kForms) {
    if (form.lane_op != op) continue;
    how.op = form.op;
    make_options<HalfOptions>(decoder.out) = how;
    return form.decode(decoder, run_half, type, type);
  }
  throw Unsupported("operation of this type");
}

}  // namespace gpu_emulator::exec
