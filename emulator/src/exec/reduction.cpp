#include "reduction.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "number_formats.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Type;

// fp16 and bf16: computed in fp32 (exact but for the one rounding of a sum).
template <bool kIsBf16>
struct Half {
  uint16_t bits;
  float value() const { return kIsBf16 ? bf16_to_float(bits) : f16_to_float(bits); }
  static Half of(float value) {
    return {static_cast<uint16_t>(to_small(value, kIsBf16 ? kBf16Format : kF16Format, {}))};
  }
};

template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return std::max(a, b);
}

template <class T>
T sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

template <class T>
T combine(ReductionOp op, T a, T b) {
  switch (op) {
    case ReductionOp::kAdd:
      return sum(a, b);
    case ReductionOp::kMin:
      return smaller(a, b);
    case ReductionOp::kMax:
      return larger(a, b);
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case ReductionOp::kInc:
        return a >= b ? 0 : a + 1;
      case ReductionOp::kDec:
        return a == 0 || a > b ? b : a - 1;
      case ReductionOp::kAnd:
        return a & b;
      case ReductionOp::kOr:
        return a | b;
      default:
        return a ^ b;
    }
  }
  return a;
}

template <bool kIsBf16>
Half<kIsBf16> combine(ReductionOp op, Half<kIsBf16> a, Half<kIsBf16> b) {
  return Half<kIsBf16>::of(combine(op, a.value(), b.value()));
}

template <class T>
void reduce_elements(ReductionOp op, std::byte* memory, const std::byte* values, size_t bytes) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T value;
    std::memcpy(&value, values + i, sizeof(T));
    auto* p = reinterpret_cast<Bits*>(memory + i);
    Bits before = __atomic_load_n(p, __ATOMIC_RELAXED), after;
    do {
      after = std::bit_cast<Bits>(combine(op, std::bit_cast<T>(before), value));
    } while (
        !__atomic_compare_exchange_n(p, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
}

}  // namespace

void reduce(const Reduction& reduction, std::byte* memory, const std::byte* values, size_t bytes) {
  auto run = [&]<class T>(T) { reduce_elements<T>(reduction.op, memory, values, bytes); };
  switch (reduction.type) {
    case Type::kF16:
      return run(Half<false>{});
    case Type::kBf16:
      return run(Half<true>{});
    case Type::kF32:
      return run(float{});
    case Type::kF64:
      return run(double{});
    case Type::kS32:
      return run(int32_t{});
    case Type::kS64:
      return run(int64_t{});
    case Type::kU64:
    case Type::kB64:
      return run(uint64_t{});
    default:
      return run(uint32_t{});
  }
}

}  // namespace gpu_emulator::exec
