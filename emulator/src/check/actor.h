#pragma once

// One access as shadow memory sees it: who, when, and what that thread has seen so far.

#include <cstdint>
#include <string>

#include "../exec/report.h"
#include "order.h"
#include "record.h"

namespace gpu_emulator::check {

struct Previous {  // an access found in shadow memory
  Record record;
  uint32_t lanes;  // by which lanes of its warp
  uint64_t cluster;
  bool is_write;
};

struct Actor {
  exec::Warp* warp;
  WarpOrder* order;
  const Clock* common;  // of all lanes of the access; null: they differ
  AccessState state;    // kPlain, kStrong, kAsync, kAsyncStrong
  bool is_write;
  bool orders_accesses;
  uint32_t site;

  // Whether an access of the own cluster is known to have happened before all lanes of this one.
  bool knows(Record record) const { return common && order->known.has(record); }

  const Clock& clock(int lane) const { return common ? *common : order->clock_of(lane); }
  Record record(int lane) const {
    return Record(state, order->stamp, site, order->agent, static_cast<uint32_t>(lane));
  }
  // Whether the previous access happened before this one of `lane`.
  bool comes_after(const Previous& previous, int lane) const;
  // Whether a generic-proxy write is visible to this access of the async proxy.
  bool is_fenced(const Previous& previous, int lane) const;
};

// Where shadow memory found a conflict: for the report.
struct Place {
  exec::Space space;
  uint64_t address;
  uint32_t bytes;
};

// Writes the sentences; see reporter.cpp. Returns where such reports are switched off.
class Reporter {
 public:
  virtual ~Reporter() = default;
  virtual void conflict(const Actor& actor, int lane, const Previous& previous,
                        const Place& place) = 0;
  virtual void missing_fence(const Actor& actor, int lane, const Previous& previous,
                             const Place& place) = 0;
  // Whether two lanes of one store instruction write the same value to the same place.
  virtual bool same_value(const Actor& actor, int lane, int other) = 0;
};

inline View view_of(Record record) {
  return is_async(record.state()) ? View::kAsync : View::kGeneric;
}

inline bool Actor::comes_after(const Previous& previous, int lane) const {
  const Record record = previous.record;
  const bool own_cluster = previous.cluster == order->cluster->index;
  if (own_cluster && record.agent() == order->agent && previous.lanes == 1u << lane &&
      view_of(record) == View::kGeneric) {
    return true;  // program order
  }
  const Clock& mine = clock(lane);
  if (own_cluster) {
    if (mine.own.has_seen(view_of(record), static_cast<int>(record.agent()), previous.lanes,
                          record.stamp())) {
      if (common &&
          mine.own.at(view_of(record), static_cast<int>(record.agent())) >= record.stamp()) {
        order->known.add(record);
      }
      return true;
    }
    return false;
  }
  if (!mine.foreign) return false;
  const auto found = mine.foreign->find(previous.cluster);
  return found != mine.foreign->end() &&
         found->second.has_seen(view_of(record), static_cast<int>(record.agent()), previous.lanes,
                                record.stamp());
}

inline bool Actor::is_fenced(const Previous& previous, int lane) const {
  const Record record = previous.record;
  if (view_of(record) == View::kAsync) return true;
  const Clock& mine = clock(lane);
  const ClusterClock* known = &mine.own;
  if (previous.cluster != order->cluster->index) {
    if (!mine.foreign) return false;
    const auto found = mine.foreign->find(previous.cluster);
    if (found == mine.foreign->end()) return false;
    known = &found->second;
  }
  return known->has_seen(View::kFenced, static_cast<int>(record.agent()), previous.lanes,
                         record.stamp());
}

}  // namespace gpu_emulator::check
