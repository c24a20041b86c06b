// ld, ldu, st, cvta, isspacep, prefetch and relatives (PTX 9.7.9).

#include <cstring>

#include "decode.h"
#include "function_decoder.h"
#include "memory.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Operand;
using ptx::Type;

AccessForm form_of(const Instruction& in, AccessKind kind) {
  AccessForm form;
  form.space = in.space;
  form.kind = kind;
  form.order = in.order;
  form.scope = in.scope;
  form.bytes = form.alignment = static_cast<uint32_t>(in.bytes) * in.count;
  return form;
}

template <class T>
using Aliasing [[gnu::may_alias]] = T;

bool is_wide(const Instruction& in, int element) {  // the element's register has 64 bits
  return options<AccessOptions>(in).wide_elements >> element & 1;
}

template <class T>
void load_element(Warp& warp, const Instruction& in, uint32_t mask, std::byte* const* host,
                  int element) {
  const Slot slot = warp.list(in)[element];
  if (slot == kNoSlot) return;
  const size_t offset = sizeof(T) * element;
  const bool ordered = in.order != Order::kWeak;
  auto value = [&](int lane) {
    const auto* p = reinterpret_cast<const Aliasing<T>*>(host[lane] + offset);
    return ordered ? __atomic_load_n(p, __ATOMIC_ACQUIRE) : *p;
  };
  if (is_wide(in, element)) {
    auto* d = warp.lanes<uint64_t>(slot);
    for_each_lane(mask, [&](int lane) {
      d[lane] = static_cast<uint64_t>(static_cast<int64_t>(value(lane)));
    });
  } else {
    auto* d = warp.lanes<uint32_t>(slot);
    const uint32_t keep = options<AccessOptions>(in).registers_of_16_bits ? 0xffff : ~0u;
    for_each_lane(mask, [&](int lane) { d[lane] = static_cast<uint32_t>(value(lane)) & keep; });
  }
}

template <class T>
Step run_load(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  resolve(warp, form_of(in, AccessKind::kLoad), mask, address, host);
  for (int k = 0; k < in.count; ++k) load_element<T>(warp, in, mask, host, k);
  return in.order == Order::kWeak ? Step::kNext : Step::kYield;  // a loop may poll with it
}

template <class T>
void store_element(Warp& warp, const Instruction& in, uint32_t mask, std::byte* const* host,
                   int element) {
  const Slot slot = warp.list(in)[element];
  const size_t offset = sizeof(T) * element;
  const bool ordered = in.order != Order::kWeak;
  auto store = [&](int lane, T value) {
    auto* p = reinterpret_cast<Aliasing<T>*>(host[lane] + offset);
    if (ordered) {
      __atomic_store_n(p, value, __ATOMIC_SEQ_CST);
    } else {
      *p = value;
    }
  };
  if (is_wide(in, element)) {
    const auto* s = warp.lanes<uint64_t>(slot);
    for_each_lane(mask, [&](int lane) { store(lane, static_cast<T>(s[lane])); });
  } else {
    const auto* s = warp.lanes<uint32_t>(slot);
    for_each_lane(mask, [&](int lane) { store(lane, static_cast<T>(s[lane])); });
  }
}

template <class T>
Step run_store(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  resolve(warp, form_of(in, AccessKind::kStore), mask, address, host);
  for (int k = 0; k < in.count; ++k) store_element<T>(warp, in, mask, host, k);
  return Step::kNext;
}

// 128-bit registers: low halves, then high halves.
Step run_load_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  resolve(warp, form_of(in, AccessKind::kLoad), mask, address, host);
  for (int k = 0; k < in.count; ++k) {
    const Slot slot = warp.list(in)[k];
    if (slot == kNoSlot) continue;
    auto* d = warp.lanes<uint64_t>(slot);
    for_each_lane(mask, [&](int lane) {
      std::memcpy(&d[lane], host[lane] + 16 * k, 8);
      std::memcpy(&d[lane + kWarpSize], host[lane] + 16 * k + 8, 8);
    });
  }
  return Step::kNext;
}

Step run_store_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  resolve(warp, form_of(in, AccessKind::kStore), mask, address, host);
  for (int k = 0; k < in.count; ++k) {
    const auto* s = warp.lanes<uint64_t>(warp.list(in)[k]);
    for_each_lane(mask, [&](int lane) {
      std::memcpy(host[lane] + 16 * k, &s[lane], 8);
      std::memcpy(host[lane] + 16 * k + 8, &s[lane + kWarpSize], 8);
    });
  }
  return Step::kNext;
}

Handler load_handler(Type type) {
  switch (type) {
    case Type::kS8:
      return run_load<int8_t>;
    case Type::kS16:
      return run_load<int16_t>;
    case Type::kS32:
      return run_load<int32_t>;
    default:
      break;
  }
  switch (size_of(type)) {
    case 1:
      return run_load<uint8_t>;
    case 2:
      return run_load<uint16_t>;
    case 4:
      return run_load<uint32_t>;
    case 8:
      return run_load<uint64_t>;
    case 16:
      return run_load_b128;
    default:
      throw Unsupported("load of this type");
  }
}

Handler store_handler(Type type) {
  switch (size_of(type)) {
    case 1:
      return run_store<uint8_t>;
    case 2:
      return run_store<uint16_t>;
    case 4:
      return run_store<uint32_t>;
    case 8:
      return run_store<uint64_t>;
    case 16:
      return run_store_b128;
    default:
      throw Unsupported("store of this type");
  }
}

// Hints that change no result: cache operators, eviction priorities, prefetch sizes.
void take_cache_hints(Decoder& decoder) {
  decoder.take("nc");
  decoder.take_any({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  while (!decoder.take_starting("L1::").empty()) {
  }
  while (!decoder.take_starting("L2::").empty()) {
  }
  decoder.take("unified");
}

int take_vector(Decoder& decoder) {
  constexpr int kCounts[] = {2, 4, 8};
  const int found = decoder.take_any({"v2", "v4", "v8"});
  return found < 0 ? 1 : kCounts[found];
}

// Parameters of a function that is no entry, and .param variables in a body, lie in the frame.
void place_param(Decoder& decoder, const Operand& address) {
  if (decoder.out.space != Space::kParam || address.elements.empty()) return;
  const Operand& base = address.elements[0];
  const bool of_entry = decoder.function.ast().is_entry;
  const bool is_parameter =
      base.kind == Operand::Kind::kVariable ? base.variable_scope == Operand::Scope::kParam : true;
  if (!of_entry || !is_parameter) decoder.out.space = Space::kLocal;
}

void decode_access(Decoder& decoder, bool is_load) {
  Instruction& out = decoder.out;
  decoder.memory_order();
  take_cache_hints(decoder);
  out.space = decoder.take_space();
  const int count = take_vector(decoder);
  const Type type = decoder.take_type();
  out.bytes = static_cast<uint8_t>(size_of(type));
  const Operand& memory = decoder.operand(is_load ? 1 : 0);
  const auto values = decoder.elements(decoder.operand(is_load ? 0 : 1));
  if (static_cast<int>(values.size()) != count) throw Unsupported("vector of another length");
  decoder.set_address(memory);
  place_param(decoder, memory);
  AccessOptions& registers = make_options<AccessOptions>(out);
  std::vector<Slot> slots;
  for (size_t k = 0; k < values.size(); ++k) {
    const int bytes = decoder.register_bytes(values[k]);
    if (bytes >= 0 && bytes < size_of(type)) throw Unsupported("register too small");
    slots.push_back(is_load ? decoder.destination(values[k], bytes, true)
                            : decoder.source(values[k], type, true));
    const bool is_wide = bytes == 8 || (bytes < 0 && !is_load && size_of(type) == 8);
    if (is_wide) registers.wide_elements |= static_cast<uint8_t>(1 << k);
    if (bytes == 2) registers.registers_of_16_bits = true;
  }
  decoder.list(slots);
  out.run = is_load ? load_handler(type) : store_handler(type);
  out.counter_class = is_load ? InstructionClass::kLoad : InstructionClass::kStore;
}

void decode_load(Decoder& decoder) { decode_access(decoder, true); }
void decode_store(Decoder& decoder) { decode_access(decoder, false); }

// ------------------------------------------------------------------------ cvta, isspacep, prefetch

uint64_t window_of(Space space) {
  switch (space) {
    case Space::kShared:
      return kSharedWindow;
    case Space::kLocal:
      return kLocalWindow;
    case Space::kParam:
      return kParamWindow;
    default:
      return 0;
  }
}

Step run_cvta(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint64_t>(in.a);
  auto* d = warp.lanes<uint64_t>(in.d);
  const uint64_t window = window_of(in.space);
  const bool to_space = options<AddressOptions>(in).from_generic;
  for_each_lane(mask, [&](int lane) {
    d[lane] = !window ? a[lane] : to_space ? a[lane] & ~kWindowMask : a[lane] | window;
  });
  return Step::kNext;
}

void decode_cvta(Decoder& decoder) {
  Instruction& out = decoder.out;
  make_options<AddressOptions>(out).from_generic = decoder.take("to");
  out.space = decoder.take_space();
  const Type type = decoder.take_type();
  if (size_of(type) != 8) throw Unsupported("32-bit generic addresses");
  out.d = decoder.destination(0, 8);
  out.a = decoder.source(1, type);
  out.run = run_cvta;
  out.counter_class = InstructionClass::kMove;
}

Step run_isspacep(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint64_t>(in.a);
  const bool own_cta = options<SpaceOptions>(in).own_cta;
  uint32_t result = 0;
  for_each_lane(mask, [&](int lane) {
    bool is_in = space_of_generic(a[lane]) == in.space;
    if (is_in && own_cta) is_in = (a[lane] & ~kWindowMask) >> kSharedRankShift == warp.cta->rank;
    result |= static_cast<uint32_t>(is_in) << lane;
  });
  warp.set_predicate(in.d, mask, result);
  return Step::kNext;
}

void decode_isspacep(Decoder& decoder) {
  Instruction& out = decoder.out;
  // .shared alone means .shared::cta.
  const bool any_cta = decoder.take("shared::cluster");
  out.space = any_cta ? Space::kShared : decoder.take_space();
  make_options<SpaceOptions>(out).own_cta = out.space == Space::kShared && !any_cta;
  out.d = decoder.destination(0, 0);
  out.a = decoder.source(1, Type::kU64);
  out.run = run_isspacep;
  out.counter_class = InstructionClass::kCompare;
}

Step run_nothing(Warp&, const Instruction&, uint32_t) { return Step::kNext; }

// Prefetches and cache policies: no result depends on them. Bad addresses are forgiven by hardware.
void decode_hint(Decoder& decoder) {
  take_cache_hints(decoder);
  decoder.take_any({"global", "local"});
  while (!decoder.take_starting("L").empty()) {
  }
  decoder.out.run = run_nothing;
}

Step run_createpolicy(Warp& warp, const Instruction& in, uint32_t mask) {
  auto* d = warp.lanes<uint64_t>(in.d);
  for_each_lane(mask, [&](int lane) { d[lane] = 0; });
  return Step::kNext;
}

void decode_createpolicy(Decoder& decoder) {
  decoder.take_any({"fractional", "range", "cvt"});
  take_cache_hints(decoder);
  decoder.take("global");
  decoder.take("b64");
  decoder.out.d = decoder.destination(0, 8);
  decoder.out.run = run_createpolicy;
}

constexpr Form kForms[] = {
    {"ld", decode_load},           {"ldu", decode_load},
    {"st", decode_store},          {"cvta", decode_cvta},
    {"isspacep", decode_isspacep}, {"prefetch", decode_hint},
    {"prefetchu", decode_hint},    {"applypriority", decode_hint},
    {"discard", decode_hint},      {"createpolicy", decode_createpolicy},
};

}  // namespace

std::span<const Form> memory_forms() { return kForms; }

}  // namespace gpu_emulator::exec
