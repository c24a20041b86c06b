// f32 and f64 arithmetic rounded towards zero or an infinity (.rz, .rm, .rp), by the host's
// rounding mode. Values pass through volatile variables, so that no operation moves out of its
// mode.

#include <cfenv>
#include <cmath>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Type;

class RoundingScope {
 public:
  explicit RoundingScope(Rounding rounding) {
    constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(kModes[static_cast<int>(rounding)]);
  }
  ~RoundingScope() { std::fesetround(FE_TONEAREST); }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;
};

template <LaneOp kOp, class T>
T compute(T a, T b, T c) {
  volatile T x = a, y = b, z = c;
  volatile T result = 0;
  switch (kOp) {
    case LaneOp::kAdd:
      result = x + y;
      break;
    case LaneOp::kSub:
      result = x - y;
      break;
    case LaneOp::kMulLo:
      result = x * y;
      break;
    case LaneOp::kFma:
      result = std::fma(T(x), T(y), T(z));
      break;
    case LaneOp::kDiv:
      result = x / y;
      break;
    case LaneOp::kRcp:
      result = T(1) / x;
      break;
    default:
      result = std::sqrt(T(x));
      break;
  }
  return result;
}

template <bool kFtz, class T>
T flushed_if(T x) {
  if constexpr (kFtz) return flushed(x);
  return x;
}

template <class T>
T saturated(T x) {
  return x > 0 ? (x > 1 ? T(1) : x) : T(0);
}

template <LaneOp kOp, class T, bool kFtz, bool kSaturate>
Step run_rounded(Warp& warp, const Instruction& in, uint32_t mask) {
  using C = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const C* a = warp.lanes<C>(in.a);
  const C* b = in.b == kNoSlot ? a : warp.lanes<C>(in.b);
  const C* c = in.c == kNoSlot ? a : warp.lanes<C>(in.c);
  C* d = warp.lanes<C>(in.d);
  const RoundingScope scope(options<RoundingOptions>(in).rounding);
  for_each_lane(mask, [&](int i) {
    auto of = [](C bits) { return flushed_if<kFtz>(__builtin_bit_cast(T, bits)); };
    T result = compute<kOp, T>(of(a[i]), of(b[i]), of(c[i]));
    if (kSaturate) result = saturated(result);
    d[i] = __builtin_bit_cast(C, flushed_if<kFtz>(result));
  });
  return Step::kNext;
}

template <LaneOp kOp>
Handler of_type(Type type, bool ftz, bool saturate) {
  if (type == Type::kF64) return run_rounded<kOp, double, false, false>;
  if (type != Type::kF32) return nullptr;
  if (saturate) {
    return ftz ? run_rounded<kOp, float, true, true> : run_rounded<kOp, float, false, true>;
  }
  return ftz ? run_rounded<kOp, float, true, false> : run_rounded<kOp, float, false, false>;
}

}  // namespace

Handler rounded_handler(LaneOp op, Type type, bool ftz, bool saturate) {
  switch (op) {
    case LaneOp::kAdd:
      return of_type<LaneOp::kAdd>(type, ftz, saturate);
    case LaneOp::kSub:
      return of_type<LaneOp::kSub>(type, ftz, saturate);
    case LaneOp::kMulLo:
      return of_type<LaneOp::kMulLo>(type, ftz, saturate);
    case LaneOp::kFma:
      return of_type<LaneOp::kFma>(type, ftz, saturate);
    case LaneOp::kDiv:
      return of_type<LaneOp::kDiv>(type, ftz, saturate);
    case LaneOp::kRcp:
      return of_type<LaneOp::kRcp>(type, ftz, saturate);
    case LaneOp::kSqrt:
      return of_type<LaneOp::kSqrt>(type, ftz, saturate);
    default:
      return nullptr;
  }
}

}  // namespace gpu_emulator::exec
