// atom and red (PTX 9.7.13.15, 9.7.13.16): all operations and types, packed and vector ones too.
// Every element is one atomic operation on the host, in the order of the lanes.

#include <cmath>
#include <cstring>

#include "decode.h"
#include "function_decoder.h"
#include "memory.h"
#include "number_formats.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Type;

using enum AtomicOp;

// ----------------------------------------------------------------------------- one element's value

template <class T>
T pick(AtomicOp op, T a, T b) {
  return (op == kMin) == (b < a) ? b : a;
}

uint64_t integer_result(AtomicOp op, Type type, uint64_t old, uint64_t b) {
  switch (op) {
    case kAdd:
      return old + b;
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kInc:
      return old >= b ? 0 : old + 1;
    case kDec:
      return old == 0 || old > b ? b : old - 1;
    case kMin:
    case kMax:
      if (type == Type::kS32) {
        return static_cast<uint64_t>(
            pick<int32_t>(op, static_cast<int32_t>(old), static_cast<int32_t>(b)));
      }
      if (type == Type::kS64) {
        return static_cast<uint64_t>(
            pick<int64_t>(op, static_cast<int64_t>(old), static_cast<int64_t>(b)));
      }
      return pick<uint64_t>(op, old, b);
    default:
      return b;  // exch
  }
}

// Of one f16 or bf16.
uint32_t half_result(AtomicOp op, bool is_bf16, uint32_t old, uint32_t b) {
  const SmallFormat& format = is_bf16 ? kBf16Format : kF16Format;
  auto value = [&](uint32_t bits) { return is_bf16 ? bf16_to_float(bits) : f16_to_float(bits); };
  const float x = value(old), y = value(b);
  if (op == kAdd) return to_small(static_cast<long double>(x) + y, format, {});
  if (std::isnan(x)) return b;
  if (std::isnan(y)) return old;
  return (op == kMin) == (y < x) ? b : old;
}

uint64_t float_result(AtomicOp op, Type type, uint64_t old, uint64_t b) {
  const bool is_bf16 = type == Type::kBf16 || type == Type::kBf16x2;
  const auto x = static_cast<uint32_t>(old), y = static_cast<uint32_t>(b);
  switch (type) {
    case Type::kF64:
      return __builtin_bit_cast(uint64_t,
                                __builtin_bit_cast(double, old) + __builtin_bit_cast(double, b));
    case Type::kF32: {
      const float p = __builtin_bit_cast(float, x), q = __builtin_bit_cast(float, y);
      const float result = op == kAdd ? p + q : op == kMin ? std::fmin(p, q) : std::fmax(p, q);
      return __builtin_bit_cast(uint32_t, result);
    }
    case Type::kF16x2:
    case Type::kBf16x2:
      return half_result(op, is_bf16, x & 0xffff, y & 0xffff) |
             half_result(op, is_bf16, x >> 16, y >> 16) << 16;
    default:
      return half_result(op, is_bf16, x & 0xffff, y & 0xffff);
  }
}

uint64_t result_of(const Instruction& in, uint64_t old, uint64_t b, uint64_t c) {
  const AtomicOp op = options<AtomicOptions>(in).op;
  if (op == kCas) return old == b ? c : old;
  if (op == kExch) return b;
  return is_float(in.type) ? float_result(op, in.type, old, b)
                           : integer_result(op, in.type, old, b);
}

template <class T>
using Aliasing [[gnu::may_alias]] = T;

// The old value.
template <class T>
T update(const Instruction& in, std::byte* place, T b, T c) {
  auto* p = reinterpret_cast<Aliasing<T>*>(place);
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  T next;
  do {
    next = static_cast<T>(result_of(in, old, b, c));
  } while (!__atomic_compare_exchange_n(p, &old, next, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

// --------------------------------------------------------------------------------------- execution

// Loops that take a lock poll with these.
bool polls(const Instruction& in) {
  const AtomicOp op = options<AtomicOptions>(in).op;
  return op == kCas || op == kExch;
}

// Function::lists: count slots of b, then of d (kNoSlot without a result). c: the value of cas.
template <class T>
Step run_atomic(Warp& warp, const Instruction& in, uint32_t mask) {
  using C = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  AccessForm form;
  form.space = in.space;
  form.kind = AccessKind::kAtomic;
  form.order = in.order;
  form.scope = in.scope;
  form.bytes = form.alignment = static_cast<uint32_t>(sizeof(T)) * in.count;
  resolve(warp, form, mask, address, host);
  const Slot* slots = warp.list(in);
  const C* c = in.c == kNoSlot ? nullptr : warp.lanes<C>(in.c);
  for (int k = 0; k < in.count; ++k) {
    const C* b = warp.lanes<C>(slots[k]);
    const Slot result = slots[in.count + k];
    for_each_lane(mask, [&](int lane) {
      const T old = update<T>(in, host[lane] + sizeof(T) * k, static_cast<T>(b[lane]),
                              c ? static_cast<T>(c[lane]) : T(0));
      if (result != kNoSlot) warp.lanes<C>(result)[lane] = old;
    });
  }
  return polls(in) ? Step::kYield : Step::kNext;
}

// 128 bits: exchange and compare-and-swap only, one at a time in a launch.
Step run_atomic_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  AccessForm form;
  form.space = in.space;
  form.kind = AccessKind::kAtomic;
  form.order = in.order;
  form.scope = in.scope;
  form.bytes = form.alignment = 16;
  resolve(warp, form, mask, address, host);
  const uint64_t* b = warp.lanes<uint64_t>(warp.list(in)[0]);
  const Slot result = warp.list(in)[1];
  const uint64_t* c = in.c == kNoSlot ? nullptr : warp.lanes<uint64_t>(in.c);
  const std::lock_guard lock(launch_of(warp).wide_atomics);
  for_each_lane(mask, [&](int lane) {
    uint64_t old[2];
    std::memcpy(old, host[lane], 16);
    const uint64_t expected[2] = {b[lane], b[lane + kWarpSize]};
    const bool swaps = !c || std::memcmp(old, expected, 16) == 0;
    const uint64_t* source = c ? c : b;
    const uint64_t next[2] = {source[lane], source[lane + kWarpSize]};
    if (swaps) std::memcpy(host[lane], next, 16);
    if (result != kNoSlot) {
      warp.lanes<uint64_t>(result)[lane] = old[0];
      warp.lanes<uint64_t>(result)[lane + kWarpSize] = old[1];
    }
  });
  return Step::kNext;
}

// ---------------------------------------------------------------------------------------- decoding

Handler handler_of(Type type) {
  switch (size_of(type)) {
    case 2:
      return run_atomic<uint16_t>;
    case 4:
      return run_atomic<uint32_t>;
    case 8:
      return run_atomic<uint64_t>;
    case 16:
      return run_atomic_b128;
    default:
      throw Unsupported("atomic operation of this type");
  }
}

void check_operation(AtomicOp op, Type type, int count) {
  const bool swaps = op == kExch || op == kCas;
  if (size_of(type) == 16 && !swaps) throw Unsupported("atomic operation of 128 bits");
  if (is_float(type) && op != kAdd && op != kMin && op != kMax) {
    throw Unsupported("atomic operation of this type");
  }
  if (type == Type::kF64 && op != kAdd) throw Unsupported("atomic operation of this type");
  if (size_of(type) == 2 && !is_float(type) && op != kCas && op != kExch) {
    throw Unsupported("atomic operation of this type");
  }
  if (count > 1 && !is_float(type)) throw Unsupported("vector of this type");
}

void decode_atomic(Decoder& decoder, bool has_result) {
  Instruction& out = decoder.out;
  out.order = Order::kRelaxed;
  out.scope = Scope::kGpu;
  decoder.memory_order();
  out.space = decoder.take_space();
  const bool has_policy = decoder.take("L2::cache_hint");
  const int found =
      decoder.take_any({"add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec"});
  if (found < 0) throw Unsupported("atomic operation");
  const auto op = static_cast<AtomicOp>(found);
  decoder.take("noftz");
  constexpr int kCounts[] = {2, 4, 8};
  const int vector = decoder.take_any({"v2", "v4", "v8"});
  out.type = decoder.take_type();
  out.count = static_cast<uint16_t>(vector < 0 ? 1 : kCounts[vector]);
  make_options<AtomicOptions>(out).op = op;
  check_operation(op, out.type, out.count);
  const size_t first = has_result ? 1 : 0;
  decoder.set_address(decoder.operand(first));
  const auto sources = decoder.elements(decoder.operand(first + 1));
  if (sources.size() != out.count) throw Unsupported("vector of another length");
  std::vector<Slot> slots;
  for (const auto& source : sources) slots.push_back(decoder.source(source, out.type));
  if (op == kCas) out.c = decoder.source(first + 2, out.type);
  if (decoder.operands() > first + 2 + (op == kCas) + has_policy) throw Unsupported("operands");
  const auto results =
      has_result ? decoder.elements(decoder.operand(0)) : std::vector<ptx::Operand>(out.count);
  if (results.size() != out.count) throw Unsupported("vector of another length");
  for (const auto& result : results) {
    slots.push_back(decoder.destination(result, size_of(out.type), true));
  }
  const uint16_t count = out.count;
  decoder.list(slots);
  out.count = count;
  out.run = handler_of(out.type);
  out.counter_class = InstructionClass::kAtomic;
}

void decode_atom(Decoder& decoder) { decode_atomic(decoder, true); }
void decode_red(Decoder& decoder) { decode_atomic(decoder, false); }

constexpr Form kForms[] = {
    {"atom", decode_atom},
    {"red", decode_red},
};

}  // namespace

std::span<const Form> atomic_forms() { return kForms; }

}  // namespace gpu_emulator::exec
