// The sentences of reports.

#include "../exec/report.h"
#include "launch_checker.h"

namespace gpu_emulator::check {

void Checker::found_undefined(Warp& warp, const Access& access, int lane, uint64_t undefined) {
  if (!follow_values_) return;
  WarpState& state = state_of(warp);
  std::string& copied = state_of(*warp.cta->cluster).undefined_copy;
  const bool is_copy = access.space == Space::kGlobal && access.proxy != Proxy::kGeneric;
  if (state.origin.empty() || (is_copy && copied.empty())) {
    std::string origin =
        format("%s memory at 0x%llx, never written, which lane %d read at ", name_of(access.space),
               static_cast<unsigned long long>(access.address[lane]), lane) +
        sites_.describe(sites_.site(warp.function, warp.pc)) + ".";
    if (is_copy && copied.empty()) copied = origin;
    if (access.space == Space::kShared && !copied.empty()) {
      origin +=
          " An asynchronous copy had brought undefined values into shared memory: from " + copied;
    }
    if (state.origin.empty()) state.origin = std::move(origin);
  }
  if (access.proxy == Proxy::kGeneric) values_.loaded(warp, lane, undefined);
}

// An atomic operation or a reduction on memory that nobody has initialised.
void Checker::combined_undefined(Warp& warp, const Access& access, int lane) {
  auto& report = state_of(*warp.cta->cluster).undefined_output;
  if (report || !checks_[ReportKind::kUndefinedAtomic]) return;
  report.emplace(
      ReportKind::kUndefinedAtomic,
      format("An atomic operation adds to global memory at 0x%llx, which was never written.",
             static_cast<unsigned long long>(access.address[lane])) +
          "\n  at " + exec::where(warp, lane));
}

void Checker::require_defined(Warp& warp, const Access& access, int lane, uint64_t undefined) {
  auto& report = state_of(*warp.cta->cluster).undefined_output;
  if (!undefined || report || !checks_[ReportKind::kUndefinedStore]) return;
  const std::string& origin = state_of(warp).origin;
  report.emplace(
      ReportKind::kUndefinedStore,
      format("An undefined value is written to global memory at 0x%llx.",
             static_cast<unsigned long long>(access.address[lane])) +
          (origin.empty() ? " It comes from a register that was not written before."
                          : " The first undefined value that this warp read was " + origin) +
          "\n  at " + exec::where(warp, lane));
}

std::string Checker::describe(const Previous& previous) const {
  return sites_.describe_thread(previous.cluster, previous.record.agent(), previous.lanes) +
         " at " + sites_.describe(previous.record.site());
}

void Checker::conflict(const Actor& actor, int lane, const Previous& previous, const Place& place) {
  const bool is_in_flight = previous.record.in_flight() || is_async(previous.record.state());
  if (!checks_[is_in_flight ? ReportKind::kInFlight : ReportKind::kRace]) return;
  const char* verb = actor.is_write ? "writes" : "reads";
  const std::string where = format("%s memory at 0x%llx (%u bytes)", name_of(place.space),
                                   static_cast<unsigned long long>(place.address), place.bytes);
  if (is_in_flight) {
    exec::fail(
        *actor.warp, lane, ReportKind::kInFlight,
        format("This thread %s ", verb) + where + ", which an asynchronous operation still " +
            (previous.is_write ? "writes" : "reads") +
            ": no wait for its completion comes between.\n  issued by " + describe(previous));
  }
  exec::fail(*actor.warp, lane, ReportKind::kRace,
             format("Race: this thread %s ", verb) + where +
                 format(", which another access %s; nothing orders the two.\n  other access: ",
                        previous.is_write ? "wrote" : "read") +
                 describe(previous));
}

void Checker::missing_fence(const Actor& actor, int lane, const Previous& previous,
                            const Place& place) {
  if (!checks_[ReportKind::kProxyFence]) return;
  exec::fail(*actor.warp, lane, ReportKind::kProxyFence,
             format("An operation of the async proxy %s %s memory at 0x%llx that was written by "
                    "the generic proxy: no fence.proxy.async comes between.\n  written by ",
                    actor.is_write ? "writes" : "reads", name_of(place.space),
                    static_cast<unsigned long long>(place.address)) +
                 describe(previous));
}

bool Checker::same_value(const Actor& actor, int lane, int other) {
  const Warp& warp = *actor.warp;
  const exec::Instruction& in = warp.function->code[warp.pc];
  if (warp.function->effects[warp.pc].flow != exec::Flow::kStore || in.bytes > 4) return false;
  for (int k = 0; k < in.count; ++k) {
    const uint32_t* values = warp.lanes<uint32_t>(warp.list(in)[k]);
    if (values[lane] != values[other]) return false;
  }
  return in.count > 0;
}

}  // namespace gpu_emulator::check
