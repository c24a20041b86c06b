// mov with packing and special registers, shuffles of bits within a register (PTX 9.7.9.3).

#include <chrono>
#include <type_traits>

#include "families.h"
#include "function_decoder.h"
#include "warp.h"

namespace gpu_emulator::exec {
namespace {

#include "lane_access.inc.h"

using ptx::Operand;
using ptx::Type;

Step run_predicate_copy(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t a = warp.predicate(in.a);
  warp.set_predicate(in.d, mask, options<PredicateMoveOptions>(in).negated ? ~a : a);
  return Step::kNext;
}

// %clock: warp instructions executed by this warp; %globaltimer: host time in ns.
using enum ClockRegister;

template <class C>
Step run_clock(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t value = warp.executed;
  const ClockRegister source = options<ClockOptions>(in).source;
  if (source == kTimer || source == kTimerHigh) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    value = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  }
  if (source == kClockHigh || source == kTimerHigh) value >>= 32;
  write_lanes<C>(warp, in.d, mask, [=](int) { return static_cast<C>(value); });
  return Step::kNext;
}

bool decode_clock(Decoder& decoder, Type type) {
  const std::string& name = decoder.operand(1).name;
  ClockRegister which;
  if (name == "%clock" || name == "%clock64") {
    which = kClock;
  } else if (name == "%clock_hi") {
    which = kClockHigh;
  } else if (name == "%globaltimer" || name == "%globaltimer_lo") {
    which = kTimer;
  } else if (name == "%globaltimer_hi") {
    which = kTimerHigh;
  } else {
    return false;
  }
  decoder.out.d = decoder.destination(0, size_of(type));
  make_options<ClockOptions>(decoder.out).source = which;
  decoder.out.run = size_of(type) == 8 ? run_clock<uint64_t> : run_clock<uint32_t>;
  return true;
}

// Sources of part_bytes side by side in the destination.
Step run_pack(Warp& warp, const Instruction& in, uint32_t mask) {
  const Slot* parts = warp.list(in);
  const int shift = 8 * options<PackOptions>(in).part_bytes;
  for_each_lane(mask, [&](int i) {
    uint64_t value = 0;
    const uint64_t keep = (uint64_t{1} << shift) - 1;
    for (int k = 0; k < in.count; ++k) {
      value |= (warp.lanes<uint32_t>(parts[k])[i] & keep) << (shift * k);
    }
    if (in.bytes == 8) {
      warp.lanes<uint64_t>(in.d)[i] = value;
    } else {
      warp.lanes<uint32_t>(in.d)[i] = static_cast<uint32_t>(value);
    }
  });
  return Step::kNext;
}

Step run_unpack(Warp& warp, const Instruction& in, uint32_t mask) {
  const Slot* parts = warp.list(in);
  const int shift = 8 * options<PackOptions>(in).part_bytes;
  for_each_lane(mask, [&](int i) {
    const uint64_t value =
        in.bytes == 8 ? warp.lanes<uint64_t>(in.a)[i] : warp.lanes<uint32_t>(in.a)[i];
    const uint64_t keep = (uint64_t{1} << shift) - 1;
    for (int k = 0; k < in.count; ++k) {
      if (parts[k] == kNoSlot) continue;
      warp.lanes<uint32_t>(parts[k])[i] = static_cast<uint32_t>(value >> (shift * k) & keep);
    }
  });
  return Step::kNext;
}

// 128-bit registers, in parts of 64 or 32 bits.
Step run_pack_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  const Slot* parts = warp.list(in);
  const bool halves = options<PackOptions>(in).part_bytes == 8;
  auto* d = warp.lanes<uint64_t>(in.d);
  for_each_lane(mask, [&](int i) {
    uint64_t half[2] = {};
    for (int k = 0; k < in.count; ++k) {
      if (halves) {
        half[k] = warp.lanes<uint64_t>(parts[k])[i];
      } else {
        half[k / 2] |= uint64_t{warp.lanes<uint32_t>(parts[k])[i]} << (32 * (k % 2));
      }
    }
    d[i] = half[0];
    d[i + kWarpSize] = half[1];
  });
  return Step::kNext;
}

Step run_unpack_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  const Slot* parts = warp.list(in);
  const bool halves = options<PackOptions>(in).part_bytes == 8;
  const auto* a = warp.lanes<uint64_t>(in.a);
  for_each_lane(mask, [&](int i) {
    const uint64_t half[2] = {a[i], a[i + kWarpSize]};
    for (int k = 0; k < in.count; ++k) {
      if (parts[k] == kNoSlot) continue;
      if (halves) {
        warp.lanes<uint64_t>(parts[k])[i] = half[k];
      } else {
        warp.lanes<uint32_t>(parts[k])[i] = static_cast<uint32_t>(half[k / 2] >> (32 * (k % 2)));
      }
    }
  });
  return Step::kNext;
}

Step run_mov_b128(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<uint64_t>(in.a);
  auto* d = warp.lanes<uint64_t>(in.d);
  for_each_lane(mask, [&](int i) {
    d[i] = a[i];
    d[i + kWarpSize] = a[i + kWarpSize];
  });
  return Step::kNext;
}

Type bits_type(int bytes) {
  switch (bytes) {
    case 1:
      return Type::kB8;
    case 2:
      return Type::kB16;
    case 4:
      return Type::kB32;
    case 8:
      return Type::kB64;
    default:
      throw Unsupported("vector of this length");
  }
}

void decode_pack(Decoder& decoder, Type type) {
  Instruction& out = decoder.out;
  const auto parts = decoder.operand(1).elements;
  if (parts.size() < 2 || size_of(type) % parts.size()) throw Unsupported("vector of this length");
  const int part = size_of(type) / static_cast<int>(parts.size());
  out.d = decoder.destination(0, size_of(type));
  std::vector<Slot> slots;
  for (const Operand& value : parts) slots.push_back(decoder.source(value, bits_type(part)));
  out.bytes = static_cast<uint8_t>(size_of(type));
  make_options<PackOptions>(out).part_bytes = static_cast<uint8_t>(part);
  if (size_of(type) == 16) {
    decoder.list(slots);
    out.run = run_pack_b128;
  } else if (parts.size() == 2 && part >= 2) {
    out.a = slots[0];
    out.b = slots[1];
    out.run = decoder.isa.lanes({part == 4 ? LaneOp::kPack2x32 : LaneOp::kPack2x16, type});
  } else {
    decoder.list(slots);
    out.run = run_pack;
  }
}

void decode_unpack(Decoder& decoder, Type type) {
  Instruction& out = decoder.out;
  const auto parts = decoder.operand(0).elements;
  if (parts.size() < 2 || size_of(type) % parts.size()) throw Unsupported("vector of this length");
  const int part = size_of(type) / static_cast<int>(parts.size());
  bits_type(part);
  out.a = decoder.source(1, type);
  std::vector<Slot> slots;
  for (const Operand& value : parts) {
    if (value.kind == Operand::Kind::kRegister && decoder.register_bytes(value) != part) {
      throw Unsupported("destination of another size");
    }
    slots.push_back(decoder.destination(value, part, true));
  }
  out.bytes = static_cast<uint8_t>(size_of(type));
  make_options<PackOptions>(out).part_bytes = static_cast<uint8_t>(part);
  if (size_of(type) == 16) {
    decoder.list(slots);
    out.run = run_unpack_b128;
  } else if (parts.size() == 2 && part >= 2) {
    out.d = slots[0];
    out.e = slots[1];
    out.run = decoder.isa.lanes({part == 4 ? LaneOp::kUnpack2x32 : LaneOp::kUnpack2x16, type});
  } else {
    decoder.list(slots);
    out.run = run_unpack;
  }
}

void decode_mov(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Type type = decoder.take_type();
  out.counter_class = InstructionClass::kMove;
  if (decoder.operands() != 2) throw Unsupported("not two operands");
  if (type == Type::kPred) {
    out.d = decoder.destination(0, 0);
    out.a = decoder.source_predicate(decoder.operand(1),
                                     &make_options<PredicateMoveOptions>(out).negated);
    out.run = run_predicate_copy;
  } else if (decoder.operand(1).kind == Operand::Kind::kVector) {
    decode_pack(decoder, type);
  } else if (decoder.operand(0).kind == Operand::Kind::kVector) {
    decode_unpack(decoder, type);
  } else if (decoder.operand(1).kind == Operand::Kind::kSpecial && decode_clock(decoder, type)) {
    return;
  } else {
    out.d = decoder.destination(0, size_of(type));
    out.a = decoder.source(1, type);
    out.run = size_of(type) == 16 ? run_mov_b128 : decoder.isa.lanes({LaneOp::kMov, type});
  }
}

constexpr Form kForms[] = {
    {"mov", decode_mov},
};

}  // namespace

std::span<const Form> move_forms() { return kForms; }

}  // namespace gpu_emulator::exec
