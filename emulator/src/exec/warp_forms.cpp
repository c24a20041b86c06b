// Exchange between the lanes of a warp (PTX 9.7.9.5 to 9.7.9.6, 9.7.13.7 ...): shfl, vote, match,
// redux, activemask, elect.

#include <algorithm>
#include <cmath>

#include "decode.h"
#include "function_decoder.h"
#include "report.h"
#include "scheduler.h"
#include "shuffle.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Operand;
using ptx::Type;

uint32_t member_mask(const Warp& warp, Slot slot, uint32_t mask) {
  return slot == kNoSlot ? mask : uniform(warp, slot, mask, "the membermask");
}

// -------------------------------------------------------------------------------------------- shfl

Step run_shfl(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = member_mask(warp, in.e, mask);
  if (!gather(warp, member, &mask, "shfl.sync")) return Step::kRetry;
  uint32_t value[kWarpSize];
  const uint32_t* a = warp.lanes<uint32_t>(in.a);
  const uint32_t* b = warp.lanes<uint32_t>(in.b);
  const uint32_t* c = warp.lanes<uint32_t>(in.c);
  std::copy(a, a + kWarpSize, value);
  uint32_t result[kWarpSize];
  uint32_t in_range = 0;
  const ShuffleMode mode = options<ShuffleOptions>(in).mode;
  for_each_lane(mask, [&](int lane) {
    const ShuffleSource source = shuffle_source(mode, lane, b[lane], c[lane]);
    const bool is_absent = source.in_range && !(mask >> source.lane & 1);
    if (is_absent && reports(warp, ReportKind::kShuffleLane)) {
      fail(warp, lane, ReportKind::kShuffleLane,
           format("shfl.sync reads lane %d, which does not take part (membermask 0x%08x, active "
                  "0x%08x).",
                  source.lane, member, mask));
    }
    result[lane] = value[source.lane];
    in_range |= static_cast<uint32_t>(source.in_range) << lane;
  });
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  for_each_lane(mask, [&](int lane) { d[lane] = result[lane]; });
  const Slot predicate = warp.list(in)[0];
  if (predicate != kNoSlot) warp.set_predicate(predicate, mask, in_range);
  return Step::kNext;
}

void decode_shfl(Decoder& decoder) {
  Instruction& out = decoder.out;
  const bool sync = decoder.take("sync");
  const int mode = decoder.take_any({"up", "down", "bfly", "idx"});
  if (mode < 0) throw Unsupported("shuffle of this kind");
  const Type type = decoder.take_type();
  const auto results = decoder.elements(decoder.operand(0));
  make_options<ShuffleOptions>(out).mode = static_cast<ShuffleMode>(mode);
  out.d = decoder.destination(results.at(0), 4);
  decoder.list({results.size() > 1 ? decoder.destination(results[1], 0, true) : kNoSlot});
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, Type::kB32);
  out.c = decoder.source(3, Type::kB32);
  if (sync) out.e = decoder.source(4, Type::kB32);
  out.run = run_shfl;
  out.counter_class = InstructionClass::kWarp;
}

// -------------------------------------------------------------------------------- vote, activemask

Step run_vote(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = member_mask(warp, in.b, mask);
  if (!gather(warp, member, &mask, "vote.sync")) return Step::kRetry;
  uint32_t votes = warp.predicate(in.a);
  const VoteOptions how = options<VoteOptions>(in);
  if (how.negated) votes = ~votes;
  votes &= mask;
  switch (how.mode) {
    case VoteMode::kAll:
      warp.set_predicate(in.d, mask, votes == mask ? kAllLanes : 0);
      break;
    case VoteMode::kAny:
      warp.set_predicate(in.d, mask, votes ? kAllLanes : 0);
      break;
    case VoteMode::kUniform:
      warp.set_predicate(in.d, mask, votes == mask || !votes ? kAllLanes : 0);
      break;
    default: {
      uint32_t* d = warp.lanes<uint32_t>(in.d);
      for_each_lane(mask, [&](int lane) { d[lane] = votes; });
      break;
    }
  }
  return Step::kNext;
}

void decode_vote(Decoder& decoder) {
  Instruction& out = decoder.out;
  const bool sync = decoder.take("sync");
  const int mode = decoder.take_any({"all", "any", "uni", "ballot"});
  if (mode < 0) throw Unsupported("vote of this kind");
  decoder.take_type();
  VoteOptions& how = make_options<VoteOptions>(out);
  how.mode = static_cast<VoteMode>(mode);
  out.d = decoder.destination(0, how.mode == VoteMode::kBallot ? 4 : 0);
  out.a = decoder.source_predicate(decoder.operand(1), &how.negated);
  if (sync) out.b = decoder.source(2, Type::kB32);
  out.run = run_vote;
  out.counter_class = InstructionClass::kWarp;
}

Step run_activemask(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  for_each_lane(mask, [&](int lane) { d[lane] = mask; });
  return Step::kNext;
}

void decode_activemask(Decoder& decoder) {
  decoder.take_type();
  decoder.out.d = decoder.destination(0, 4);
  decoder.out.run = run_activemask;
  decoder.out.counter_class = InstructionClass::kWarp;
}

// ------------------------------------------------------------------------------------------- match

// e: predicate of match.all.
template <class T>
Step run_match(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = member_mask(warp, in.b, mask);
  if (!gather(warp, member, &mask, "match.sync")) return Step::kRetry;
  T value[kWarpSize];
  const T* a = warp.lanes<T>(in.a);
  std::copy(a, a + kWarpSize, value);
  uint32_t* d = in.d == kNoSlot ? nullptr : warp.lanes<uint32_t>(in.d);
  const bool of_all = options<MatchOptions>(in).all;
  bool all = true;
  for_each_lane(mask, [&](int lane) {
    uint32_t same = 0;
    for_each_lane(mask, [&](int other) {
      same |= static_cast<uint32_t>(value[other] == value[lane]) << other;
    });
    all = all && same == mask;
    if (d && !of_all) d[lane] = same;
  });
  if (of_all) {
    if (d) for_each_lane(mask, [&](int lane) { d[lane] = all ? mask : 0; });
    if (in.e != kNoSlot) warp.set_predicate(in.e, mask, all ? kAllLanes : 0);
  }
  return Step::kNext;
}

void decode_match(Decoder& decoder) {
  Instruction& out = decoder.out;
  const int mode = decoder.take_any({"any", "all"});
  if (mode < 0) throw Unsupported("match of this kind");
  decoder.take("sync");
  const Type type = decoder.take_type();
  const auto results = decoder.elements(decoder.operand(0));
  make_options<MatchOptions>(out).all = mode == 1;
  out.d = decoder.destination(results.at(0), 4, true);
  if (results.size() > 1) out.e = decoder.destination(results[1], 0, true);
  out.a = decoder.source(1, type);
  out.b = decoder.source(2, Type::kB32);
  out.run = size_of(type) == 8 ? run_match<uint64_t> : run_match<uint32_t>;
  out.counter_class = InstructionClass::kWarp;
}

// ------------------------------------------------------------------------------------------- redux

uint32_t reduce(const Instruction& in, uint32_t x, uint32_t y) {
  const bool is_signed_type = in.type == Type::kS32;
  switch (options<ReduxOptions>(in).op) {
    case ReduxOp::kAdd:
      return x + y;
    case ReduxOp::kMin:
      return is_signed_type ? std::min<int32_t>(x, y) : std::min(x, y);
    case ReduxOp::kMax:
      return is_signed_type ? std::max<int32_t>(x, y) : std::max(x, y);
    case ReduxOp::kAnd:
      return x & y;
    case ReduxOp::kOr:
      return x | y;
    default:
      return x ^ y;
  }
}

Step run_redux(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = member_mask(warp, in.b, mask);
  if (!gather(warp, member, &mask, "redux.sync")) return Step::kRetry;
  const uint32_t* a = warp.lanes<uint32_t>(in.a);
  uint32_t value = a[first_lane(mask)];
  for_each_lane(mask & (mask - 1), [&](int lane) { value = reduce(in, value, a[lane]); });
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  for_each_lane(mask, [&](int lane) { d[lane] = value; });
  return Step::kNext;
}

void decode_redux(Decoder& decoder) {
  Instruction& out = decoder.out;
  const int op = decoder.take_any({"add", "min", "max", "and", "or", "xor"});
  if (op < 0) throw Unsupported("reduction of this kind");
  out.type = decoder.take_type();
  if (is_float(out.type)) throw Unsupported("reduction of this type");
  make_options<ReduxOptions>(out).op = static_cast<ReduxOp>(op);
  out.d = decoder.destination(0, 4);
  out.a = decoder.source(1, out.type);
  out.b = decoder.source(2, Type::kB32);
  out.run = run_redux;
  out.counter_class = InstructionClass::kWarp;
}

// ------------------------------------------------------------------------------------------- elect

Step run_elect(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = member_mask(warp, in.a, mask);
  if (!gather(warp, member, &mask, "elect.sync")) return Step::kRetry;
  const int leader = first_lane(mask);
  if (in.d != kNoSlot) {
    uint32_t* d = warp.lanes<uint32_t>(in.d);
    for_each_lane(mask, [&](int lane) { d[lane] = static_cast<uint32_t>(leader); });
  }
  if (in.e != kNoSlot) warp.set_predicate(in.e, mask, 1u << leader);
  return Step::kNext;
}

void decode_elect(Decoder& decoder) {
  Instruction& out = decoder.out;
  const auto results = decoder.elements(decoder.operand(0));
  out.d = decoder.destination(results.at(0), 4, true);
  out.e = decoder.destination(results.at(1), 0, true);
  out.a = decoder.source(1, Type::kB32);
  out.run = run_elect;
  out.counter_class = InstructionClass::kWarp;
}

constexpr Form kForms[] = {
    {"shfl", decode_shfl},   {"vote", decode_vote},        {"activemask", decode_activemask},
    {"match", decode_match}, {"redux.sync", decode_redux}, {"elect.sync", decode_elect},
};

}  // namespace

std::span<const Form> warp_forms() { return kForms; }

}  // namespace gpu_emulator::exec
