// Integer opcodes without float forms (PTX 9.7.1, 9.7.8): shifts, bit fields, permutations, counts,
// dot products, 24-bit products.

#include <algorithm>
#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

#include "lane_access.inc.h"

using ptx::Type;

// A stateless function object as an operation.
template <auto kFunction>
struct Op {
  template <class... Args>
  static auto apply(Args... args) {
    return kFunction(args...);
  }
};

void decode_shift(Decoder& decoder, LaneOp op) {
  const Type type = decoder.take_type();
  decode_unary(decoder, decoder.isa.lanes({op, type}), type, type);
  decoder.out.b = decoder.source(2, Type::kU32);
}
void decode_shl(Decoder& decoder) { decode_shift(decoder, LaneOp::kShl); }
void decode_shr(Decoder& decoder) { decode_shift(decoder, LaneOp::kShr); }

template <bool kLeft, bool kWrap>
uint32_t funnel(uint32_t low, uint32_t high, uint32_t amount) {
  const uint32_t n = kWrap ? amount & 31 : std::min(amount, 32u);
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>(kLeft ? (both << n) >> 32 : both >> n);
}

void decode_shf(Decoder& decoder) {
  const bool left = decoder.take_any({"r", "l"}) == 1;
  const bool wrap = decoder.take_any({"clamp", "wrap"}) == 1;
  const Type type = decoder.take_type();
  using U = uint32_t;
  Handler handler = left ? (wrap ? run_ternary<Op<funnel<true, true>>, U, U>
                                 : run_ternary<Op<funnel<true, false>>, U, U>)
                         : (wrap ? run_ternary<Op<funnel<false, true>>, U, U>
                                 : run_ternary<Op<funnel<false, false>>, U, U>);
  decode_ternary(decoder, handler, type, type);
}

using enum PermuteMode;

// The selector nibbles of the special modes (PTX table of prmt).
uint32_t permute_selector(PermuteMode mode, uint32_t c) {
  const uint32_t n = c & 3;
  switch (mode) {
    case kF4e:
      return n | (n + 1) << 4 | (n + 2) << 8 | (n + 3) << 12;
    case kB4e:
      return n | ((n - 1) & 7) << 4 | ((n - 2) & 7) << 8 | ((n - 3) & 7) << 12;
    case kRc8:
      return n * 0x1111;
    case kEcl:
      return std::max(n, 0u) | std::max(n, 1u) << 4 | std::max(n, 2u) << 8 | 3u << 12;
    case kEcr:
      return std::min(n, 0u) | std::min(n, 1u) << 4 | std::min(n, 2u) << 8 | std::min(n, 3u) << 12;
    case kRc16:
      return (n & 1) ? 0x3232 : 0x1010;
    default:
      return c;
  }
}

Step run_prmt(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  const PermuteMode mode = options<PermuteOptions>(in).mode;
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    const uint64_t both = static_cast<uint64_t>(b[i]) << 32 | a[i];
    const uint32_t selector = mode == kBytes ? c[i] : permute_selector(mode, c[i]);
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t s = selector >> (4 * k) & 15;
      uint32_t byte = static_cast<uint32_t>(both >> (8 * (s & 7))) & 0xff;
      if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicates the sign
      result |= byte << (8 * k);
    }
    return result;
  });
  return Step::kNext;
}

void decode_prmt(Decoder& decoder) {
  const Type type = decoder.take_type();
  const int mode = decoder.take_any({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  make_options<PermuteOptions>(decoder.out).mode = static_cast<PermuteMode>(mode + 1);
  decode_ternary(decoder, run_prmt, type, type);
}

void decode_lop3(Decoder& decoder) {
  const Type type = decoder.take_type();
  if (decoder.operands() != 5) throw Unsupported("lop3 with a predicate");
  Instruction& out = decoder.out;
  decode_unary(decoder, decoder.isa.lanes({LaneOp::kLop3, type}), type, type);
  out.b = decoder.source(2, type);
  out.c = decoder.source(3, type);
  out.imm = decoder.immediate(4);
}

// -------------------------------------------------------------------------------------- bit fields

template <class T>
std::make_unsigned_t<T> extract(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  std::make_unsigned_t<T> result = 0;
  const bool is_signed = std::is_signed_v<T>;
  const uint32_t sign_position = std::min(position + length - 1, kBits - 1);
  const bool fill = is_signed && length && (a >> sign_position & 1);
  for (uint32_t k = 0; k < kBits; ++k) {
    const bool bit = k < length && position + k < kBits ? a >> (position + k) & 1 : fill;
    result |= static_cast<std::make_unsigned_t<T>>(bit) << k;
  }
  return result;
}

template <class T>
Step run_bfe(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<T>>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  write_lanes<Container<T>>(warp, in.d, mask,
                            [=](int i) { return extract<T>(static_cast<T>(a[i]), b[i], c[i]); });
  return Step::kNext;
}

void decode_bfe(Decoder& decoder) {
  const Type type = decoder.take_type();
  Handler handler = type == Type::kU32   ? run_bfe<uint32_t>
                    : type == Type::kS32 ? run_bfe<int32_t>
                    : type == Type::kU64 ? run_bfe<uint64_t>
                    : type == Type::kS64 ? run_bfe<int64_t>
                                         : nullptr;
  decode_unary(decoder, handler, type, type);
  decoder.out.b = decoder.source(2, Type::kU32);
  decoder.out.c = decoder.source(3, Type::kU32);
}

template <class T>
Step run_bfi(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const auto* a = warp.lanes<T>(in.a);
  const auto* b = warp.lanes<T>(in.b);
  const auto* c = warp.lanes<uint32_t>(in.c);
  const auto* e = warp.lanes<uint32_t>(in.e);
  write_lanes<T>(warp, in.d, mask, [=](int i) {
    const uint32_t position = c[i] & 0xff, length = e[i] & 0xff;
    if (position >= kBits) return b[i];
    const T ones = length >= kBits ? ~T(0) : static_cast<T>((T(1) << length) - 1);
    const T field = static_cast<T>(ones << position);
    return static_cast<T>((b[i] & ~field) | ((a[i] << position) & field));
  });
  return Step::kNext;
}

void decode_bfi(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_unary(decoder, size_of(type) == 8 ? run_bfi<uint64_t> : run_bfi<uint32_t>, type, type);
  decoder.out.b = decoder.source(2, type);
  decoder.out.c = decoder.source(3, Type::kU32);
  decoder.out.e = decoder.source(4, Type::kU32);
}

// bmsk: `length` ones from `position` on.
Step run_bmsk(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint32_t>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  const bool wrap = options<BitMaskOptions>(in).wrap;
  write_lanes<uint32_t>(warp, in.d, mask, [=](int i) {
    const uint32_t position = wrap ? a[i] & 31 : a[i], length = wrap ? b[i] & 31 : b[i];
    if (position >= 32 || !length) return 0u;
    const uint32_t ones = length >= 32 ? ~0u : (1u << length) - 1;
    return ones << position;
  });
  return Step::kNext;
}

void decode_bmsk(Decoder& decoder) {
  make_options<BitMaskOptions>(decoder.out).wrap = decoder.take_any({"clamp", "wrap"}) == 1;
  const Type type = decoder.take_type();
  decode_binary(decoder, run_bmsk, type, type);
}

// szext: sign- or zero-extends the low b bits.
template <bool kSigned>
uint32_t extend(uint32_t a, uint32_t n) {
  if (n >= 32) return a;
  if (n == 0) return 0;
  const uint32_t low = a & ((1u << n) - 1);
  return kSigned && (low >> (n - 1) & 1) ? low | ~((1u << n) - 1) : low;
}
template <bool kSigned>
uint32_t extend_wrapped(uint32_t a, uint32_t n) {
  return extend<kSigned>(a, n & 31);
}

void decode_szext(Decoder& decoder) {
  const bool wrap = decoder.take_any({"clamp", "wrap"}) == 1;
  const Type type = decoder.take_type();
  using U = uint32_t;
  Handler handler =
      type == Type::kS32
          ? (wrap ? run_binary<Op<extend_wrapped<true>>, U, U> : run_binary<Op<extend<true>>, U, U>)
          : (wrap ? run_binary<Op<extend_wrapped<false>>, U, U>
                  : run_binary<Op<extend<false>>, U, U>);
  decode_binary(decoder, handler, type, type);
}

// ----------------------------------------------------------------------------------- counting bits

template <class T>
uint32_t count_ones(T a) {
  return static_cast<uint32_t>(__builtin_popcountll(a));
}
template <class T>
uint32_t leading_zeros(T a) {
  return a ? static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
}
template <class T>
T reversed(T a) {
  T result = 0;
  for (size_t k = 0; k < 8 * sizeof(T); ++k) result |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
  return result;
}
template <class T, bool kShift>
uint32_t find_leading(T a) {
  using U = std::make_unsigned_t<T>;
  const U bits = static_cast<U>(std::is_signed_v<T> && a < 0 ? ~a : a);
  if (!bits) return ~0u;
  const uint32_t zeros = leading_zeros<U>(bits);
  return kShift ? zeros : static_cast<uint32_t>(8 * sizeof(T)) - 1 - zeros;
}

void decode_popc(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_unary(decoder,
               size_of(type) == 8 ? run_unary<Op<count_ones<uint64_t>>, uint64_t, uint32_t>
                                  : run_unary<Op<count_ones<uint32_t>>, uint32_t, uint32_t>,
               type, Type::kU32);
}
void decode_clz(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_unary(decoder,
               size_of(type) == 8 ? run_unary<Op<leading_zeros<uint64_t>>, uint64_t, uint32_t>
                                  : run_unary<Op<leading_zeros<uint32_t>>, uint32_t, uint32_t>,
               type, Type::kU32);
}
void decode_brev(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_unary(decoder,
               size_of(type) == 8 ? run_unary<Op<reversed<uint64_t>>, uint64_t, uint64_t>
                                  : run_unary<Op<reversed<uint32_t>>, uint32_t, uint32_t>,
               type, type);
}

template <class T>
Handler bfind_handler(bool shift_amount) {
  return shift_amount ? run_unary<Op<find_leading<T, true>>, T, uint32_t>
                      : run_unary<Op<find_leading<T, false>>, T, uint32_t>;
}
void decode_bfind(Decoder& decoder) {
  const bool shift_amount = decoder.take("shiftamt");
  const Type type = decoder.take_type();
  Handler handler = type == Type::kU32   ? bfind_handler<uint32_t>(shift_amount)
                    : type == Type::kS32 ? bfind_handler<int32_t>(shift_amount)
                    : type == Type::kU64 ? bfind_handler<uint64_t>(shift_amount)
                    : type == Type::kS64 ? bfind_handler<int64_t>(shift_amount)
                                         : nullptr;
  decode_unary(decoder, handler, type, Type::kU32);
}

// fns: the position of the offset-th set bit from `base` on, up (offset > 0) or down.
uint32_t find_nth(uint32_t bits, uint32_t base, int32_t offset) {
  if (offset == 0) return base < 32 && (bits >> base & 1) ? base : ~0u;
  const int step = offset > 0 ? 1 : -1;
  int left = offset > 0 ? offset : -offset;
  for (int k = static_cast<int>(base); k >= 0 && k < 32; k += step) {
    if ((bits >> k & 1) && --left == 0) return static_cast<uint32_t>(k);
  }
  return ~0u;
}
struct FindNth {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    return find_nth(a, b, static_cast<int32_t>(c));
  }
};
void decode_fns(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_ternary(decoder, run_ternary<FindNth, uint32_t, uint32_t>, type, type);
}

// ------------------------------------------------------------------------------- products and sums

template <class A, class B, bool kTwo, int kFirst>
struct Dot {  // dp4a; dp2a with the low or high pair of b's bytes
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int k = 0; k < (kTwo ? 2 : 4); ++k) {
      const auto x =
          kTwo ? static_cast<int64_t>(
                     std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>(a >> 16 * k))
               : static_cast<int64_t>(A(a >> 8 * k));
      c += static_cast<uint32_t>(x * static_cast<int64_t>(B(b >> 8 * (k + kFirst))));
    }
    return c;
  }
};

template <bool kTwo, int kFirst>
Handler dot_handler(Type a, Type b) {
  using U = uint32_t;
  if (is_signed(a)) {
    return is_signed(b) ? run_ternary<Dot<int8_t, int8_t, kTwo, kFirst>, U, U>
                        : run_ternary<Dot<int8_t, uint8_t, kTwo, kFirst>, U, U>;
  }
  return is_signed(b) ? run_ternary<Dot<uint8_t, int8_t, kTwo, kFirst>, U, U>
                      : run_ternary<Dot<uint8_t, uint8_t, kTwo, kFirst>, U, U>;
}

void decode_dp4a(Decoder& decoder) {
  const Type a = decoder.take_type(), b = decoder.take_type();
  decode_ternary(decoder, dot_handler<false, 0>(a, b), Type::kB32, Type::kB32);
}
void decode_dp2a(Decoder& decoder) {
  const bool high = decoder.take_any({"lo", "hi"}) == 1;
  const Type a = decoder.take_type(), b = decoder.take_type();
  decode_ternary(decoder, high ? dot_handler<true, 2>(a, b) : dot_handler<true, 0>(a, b),
                 Type::kB32, Type::kB32);
}

template <class T, bool kHigh>
T multiply_24(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  const auto low = [](T x) {
    return std::is_signed_v<T>
               ? static_cast<W>(static_cast<int32_t>(static_cast<uint32_t>(x) << 8) >> 8)
               : static_cast<W>(x & 0xffffff);
  };
  const W product = low(a) * low(b);
  return static_cast<T>(kHigh ? product >> 16 : product);
}
template <class T, bool kHigh>
struct Mad24 {
  static T apply(T a, T b, T c) {
    return static_cast<T>(static_cast<uint32_t>(multiply_24<T, kHigh>(a, b)) +
                          static_cast<uint32_t>(c));
  }
};

void decode_mul24(Decoder& decoder) {
  const bool high = decoder.take_any({"lo", "hi"}) == 1;
  const Type type = decoder.take_type();
  Handler handler = is_signed(type)
                        ? (high ? run_binary<Op<multiply_24<int32_t, true>>, int32_t, int32_t>
                                : run_binary<Op<multiply_24<int32_t, false>>, int32_t, int32_t>)
                        : (high ? run_binary<Op<multiply_24<uint32_t, true>>, uint32_t, uint32_t>
                                : run_binary<Op<multiply_24<uint32_t, false>>, uint32_t, uint32_t>);
  decode_binary(decoder, handler, type, type);
}
void decode_mad24(Decoder& decoder) {
  const bool high = decoder.take_any({"lo", "hi"}) == 1;
  const Type type = decoder.take_type();
  Handler handler = is_signed(type)
                        ? (high ? run_ternary<Mad24<int32_t, true>, int32_t, int32_t>
                                : run_ternary<Mad24<int32_t, false>, int32_t, int32_t>)
                        : (high ? run_ternary<Mad24<uint32_t, true>, uint32_t, uint32_t>
                                : run_ternary<Mad24<uint32_t, false>, uint32_t, uint32_t>);
  decode_ternary(decoder, handler, type, type);
}

struct Sad {  // c + |a - b|
  template <class T>
  static T apply(T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    const U difference =
        a < b ? static_cast<U>(b) - static_cast<U>(a) : static_cast<U>(a) - static_cast<U>(b);
    return static_cast<T>(static_cast<U>(c) + difference);
  }
};
void decode_sad(Decoder& decoder) {
  const Type type = decoder.take_type();
  Handler handler = type == Type::kS16   ? run_ternary<Sad, int16_t, int16_t>
                    : type == Type::kU16 ? run_ternary<Sad, uint16_t, uint16_t>
                    : type == Type::kS32 ? run_ternary<Sad, int32_t, int32_t>
                    : type == Type::kU32 ? run_ternary<Sad, uint32_t, uint32_t>
                    : type == Type::kS64 ? run_ternary<Sad, int64_t, int64_t>
                    : type == Type::kU64 ? run_ternary<Sad, uint64_t, uint64_t>
                                         : nullptr;
  decode_ternary(decoder, handler, type, type);
}

void decode_cnot(Decoder& decoder) {
  const Type type = decoder.take_type();
  decode_unary(decoder, decoder.isa.lanes({LaneOp::kCnot, type}), type, type);
}

constexpr Form kForms[] = {
    {"shl", decode_shl},     {"shr", decode_shr},     {"shf", decode_shf},   {"prmt", decode_prmt},
    {"lop3", decode_lop3},   {"bfe", decode_bfe},     {"bfi", decode_bfi},   {"bmsk", decode_bmsk},
    {"szext", decode_szext}, {"popc", decode_popc},   {"clz", decode_clz},   {"brev", decode_brev},
    {"bfind", decode_bfind}, {"fns", decode_fns},     {"dp4a", decode_dp4a}, {"dp2a", decode_dp2a},
    {"mul24", decode_mul24}, {"mad24", decode_mad24}, {"sad", decode_sad},   {"cnot", decode_cnot},
};

}  // namespace

std::span<const Form> integer_forms() { return kForms; }

}  // namespace gpu_emulator::exec
