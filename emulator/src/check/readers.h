#pragma once

// Who has read a unit of memory since it was last written. Two ways to keep it: for shared memory
// one entry for each warp that ever reads there; for global memory two readers, and a list where
// there are more.

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "actor.h"

namespace gpu_emulator::check {

// Reads of one warp since the last write: a record of one lane; where there are more, their mask
// lies elsewhere, as it is rare and shadow memory should stay in the cache. Lanes with another
// stamp than the entry's, and warps after the first kMostWarps, do not fit: add() then says so, and
// the unit is kept in detail.
class SharedReaders {
 public:
  static constexpr bool kHasClusters = false;
  static constexpr uint32_t kMostWarps = 63;

  void allocate(uint32_t units) { units_ = units; }
  void reset() {  // keeps the memory
    std::fill(bits_.begin(), bits_.end(), 0);
    index_.clear();
    warps_ = 0;
  }
  bool any(uint32_t unit) const { return !bits_.empty() && bits_[unit]; }
  // Whether all readers are known to come before the actor.
  bool all_known(uint32_t unit, const Actor& actor) const {
    const Record* records = &records_[size_t{unit} << shift_];
    for (uint64_t left = bits_[unit]; left; left &= left - 1) {
      if (!actor.knows(records[__builtin_ctzll(left)])) return false;
    }
    return true;
  }
  void clear(uint32_t unit) {
    if (!bits_.empty()) bits_[unit] = 0;
  }

  bool add(uint32_t unit, const Actor& actor, int lane) {
    const Record now = actor.record(lane);
    const int index = index_of(actor.order->agent, is_async(actor.state));
    if (index < 0) return false;
    const uint32_t bit = is_async(actor.state) ? ~0u : 1u << lane;
    uint64_t& present = bits_[unit];
    const size_t place = place_of(unit, static_cast<uint32_t>(index));
    if (!(present >> index & 1)) {
      present |= uint64_t{1} << index;
      set(place, now, bit);
      return true;
    }
    const Record record = records_[place];
    const uint32_t lanes = lanes_of(place);
    if (record.stamp() == now.stamp() && record.state() == now.state()) {
      set(place, record, lanes | bit);
      return true;
    }
    if ((lanes & ~bit) == 0 ||
        actor.comes_after(previous(place, actor.order->cluster->index), lane)) {
      set(place, now, bit);
      return true;
    }
    return false;
  }

  // Entries of one actor of the generic proxy: add() without the search for them.
  class Own {
   public:
    Own(SharedReaders& readers, const Actor& actor)
        : readers_(readers),
          actor_(actor),
          record_(actor.record(0)),
          index_(readers.index_of(actor.order->agent, false)) {}

    bool add(uint32_t unit, int lane) {
      if (add_alone(unit, lane)) return true;
      return index_ >= 0 && readers_.add(unit, actor_, lane);
    }
    // add() where no other lane of the warp has read the unit; false: not done.
    bool add_alone(uint32_t unit, int lane) {
      if (index_ < 0) return false;
      const uint64_t own = uint64_t{1} << index_;
      uint64_t& present = readers_.bits_[unit];
      Record& record = readers_.records_[readers_.place_of(unit, static_cast<uint32_t>(index_))];
      const Record now = record_.of_lane(static_cast<uint32_t>(lane));
      if ((present & own) && (record.has_more_lanes() || record.lane() != now.lane())) return false;
      present |= own;
      record = now;
      return true;
    }

   private:
    SharedReaders& readers_;
    const Actor& actor_;
    Record record_;  // of lane 0
    int index_;
  };

  template <class F>
  void for_each(uint32_t unit, uint64_t cluster, F&& f) const {
    if (bits_.empty()) return;
    for (uint64_t left = bits_[unit]; left; left &= left - 1) {
      f(previous(place_of(unit, static_cast<uint32_t>(__builtin_ctzll(left))), cluster));
    }
  }

 private:
  size_t place_of(uint32_t unit, uint32_t index) const { return (size_t{unit} << shift_) + index; }
  uint32_t lanes_of(size_t place) const {
    const Record record = records_[place];
    return record.has_more_lanes() ? lanes_[place] : 1u << record.lane();
  }
  Previous previous(size_t place, uint64_t cluster) const {
    Record record = records_[place];
    record.set_more_lanes(false);
    return {record, lanes_of(place), cluster, false};
  }
  void set(size_t place, Record record, uint32_t lanes) {
    record.set_more_lanes(lanes != 1u << record.lane());
    records_[place] = record;
    if (!record.has_more_lanes()) return;
    if (!lanes_) lanes_ = std::make_unique_for_overwrite<uint32_t[]>(size_t{units_} << shift_);
    lanes_[place] = lanes;
  }

  int index_of(uint32_t agent, bool is_async) {
    const uint32_t key = agent << 1 | is_async;
    if (key < index_.size() && index_[key] >= 0) return index_[key];
    if (warps_ == kMostWarps) return -1;
    if (bits_.empty()) bits_.resize(units_);
    if (key >= index_.size()) index_.resize(key + 1, -1);
    if (!records_ || warps_ == 1u << shift_) grow();
    index_[key] = static_cast<int8_t>(warps_++);
    return index_[key];
  }

  void grow() {
    const uint32_t before = records_ ? 1u << shift_ : 0;
    if (before) ++shift_;
    spread(records_, before);
    if (lanes_) spread(lanes_, before);
  }

  // From `before` entries of each unit to more; what is not in use stays unset.
  template <class T>
  void spread(std::unique_ptr<T[]>& entries, uint32_t before) {
    const auto old = std::move(entries);
    entries = std::make_unique_for_overwrite<T[]>(size_t{units_} << shift_);
    for (uint32_t unit = 0; before && unit < units_; ++unit) {
      if (bits_[unit])
        std::copy_n(&old[size_t{unit} * before], before, &entries[place_of(unit, 0)]);
    }
  }

  uint32_t units_ = 0, warps_ = 0;
  uint32_t shift_ = 2;                 // log2 of the entries of each unit
  std::vector<uint64_t> bits_;         // bit = index of a warp
  std::vector<int8_t> index_;          // by agent * 2 + async
  std::unique_ptr<Record[]> records_;  // by unit, then by index
  std::unique_ptr<uint32_t[]> lanes_;  // the same, where a record has more lanes
};

// The first readers not known to have happened before the others; one list for each unit that more
// than two warps read unordered. Of more than kMostReaders at once the first of the list is
// forgotten.
class GlobalReaders {
  struct Entry {
    Record record;
    uint32_t lanes = 0;
    uint32_t cluster = 0;
    Previous previous() const { return {record, lanes, cluster, false}; }
    bool same_moment(const Entry& now) const {
      return lanes && cluster == now.cluster && record.moment() == now.record.moment();
    }
    // Whether this entry can stand for `now` too, or `now` for it.
    bool takes(const Entry& now, const Actor& actor, int lane) const {
      if (cluster != now.cluster && !actor.clock(lane).foreign) return false;
      return same_moment(now) || actor.comes_after(previous(), lane);
    }
    Entry moved_by(uint32_t by) const {
      return lanes ? Entry{record.moved_by(by), lanes << by, cluster} : Entry();
    }
    bool merge(const Entry& now) {
      if (!same_moment(now)) return false;
      lanes |= now.lanes;
      return true;
    }
  };

 public:
  static constexpr bool kHasClusters = true;
  static constexpr size_t kMostReaders = 1024;

  void allocate(uint32_t units) { units_ = units; }
  bool any(uint32_t unit) const { return !entries_.empty() && entries_[unit][0].lanes; }
  bool all_known(uint32_t /*unit*/, const Actor& /*actor*/) const { return false; }
  void clear(uint32_t unit) {
    if (!entries_.empty()) entries_[unit] = {};
    if (!lists_.empty()) free_list(unit);
  }
  // The readers of a unit that has none become those of a unit of `other`, each `lanes` further on.
  void copy(uint32_t unit, const GlobalReaders& other, uint32_t from, uint32_t lanes) {
    if (!other.any(from)) return;
    if (entries_.empty()) entries_.resize(units_);
    for (size_t i = 0; i < entries_[unit].size(); ++i) {
      entries_[unit][i] = other.entries_[from][i].moved_by(lanes);
    }
    if (!other.lists_.empty()) copy_list(unit, other, from, lanes);
  }

  bool add(uint32_t unit, const Actor& actor, int lane) {
    if (entries_.empty()) entries_.resize(units_);
    const Entry now{actor.record(lane), is_async(actor.state) ? ~0u : 1u << lane,
                    static_cast<uint32_t>(actor.order->cluster->index)};
    for (Entry& entry : entries_[unit]) {
      if (!entry.lanes || entry.takes(now, actor, lane)) {
        if (!entry.merge(now)) entry = now;
        return true;
      }
    }
    add_to_list(unit, now, actor, lane);
    return true;
  }

  // Entries of one actor of the generic proxy: add(), quick where the unit's readers are of other
  // clusters of which nothing is known, or it has just been read by the actor.
  class Own {
   public:
    Own(GlobalReaders& readers, const Actor& actor)
        : readers_(readers),
          actor_(actor),
          now_{actor.record(0), 0, static_cast<uint32_t>(actor.order->cluster->index)},
          knows_others_(!actor.common || actor.common->foreign) {
      if (readers_.entries_.empty()) readers_.entries_.resize(readers_.units_);
    }

    bool add(uint32_t unit, int lane) {
      if (add_alone(unit, lane)) return true;
      const auto& first = readers_.entries_[unit];
      if (knows_others_ || first[0].cluster == now_.cluster || first[1].cluster == now_.cluster) {
        return readers_.add(unit, actor_, lane);
      }
      readers_.add_to_list(unit, now(lane), actor_, lane);
      return true;
    }
    // add() where none of the first readers has to be compared in time; false: not done.
    bool add_alone(uint32_t unit, int lane) {
      const Entry own = now(lane);
      for (Entry& entry : readers_.entries_[unit]) {
        if (!entry.lanes) {
          entry = own;
          return true;
        }
        if (entry.merge(own)) return true;
        if (knows_others_ || entry.cluster == own.cluster) return false;
      }
      const uint32_t newest = readers_.lists_.empty() ? 0 : readers_.lists_[unit].head;
      return newest && readers_.nodes_[newest].entry.merge(own);
    }

   private:
    Entry now(int lane) const {
      return {now_.record.of_lane(static_cast<uint32_t>(lane)), 1u << lane, now_.cluster};
    }

    GlobalReaders& readers_;
    const Actor& actor_;
    Entry now_;  // of lane 0
    bool knows_others_;
  };

  template <class F>
  void for_each(uint32_t unit, uint64_t /*cluster*/, F&& f) const {
    if (entries_.empty()) return;
    for (const Entry& entry : entries_[unit]) {
      if (entry.lanes) f(entry.previous());
    }
    if (lists_.empty()) return;
    for (uint32_t at = lists_[unit].head; at; at = nodes_[at].next) f(nodes_[at].entry.previous());
  }

 private:
  // Lists of a unit are chains of nodes_, the newest reader first; node 0 is the end of all.
  struct Node {
    Entry entry;
    uint32_t next = 0;
  };
  struct List {
    uint32_t head = 0, count = 0;
    uint32_t last_cluster = 0;  // none of the readers is of a later one
  };

  void add_to_list(uint32_t unit, const Entry& now, const Actor& actor, int lane) {
    List& list = list_of(unit);
    const bool is_first_of_cluster = !list.head || now.cluster > list.last_cluster;
    list.last_cluster = std::max(list.last_cluster, now.cluster);
    if (!is_first_of_cluster && replace_own(list, now, actor, lane)) return;
    if (list.count == kMostReaders) {
      nodes_[oldest_of(list)].entry = now;
    } else {
      push(list, now);
    }
  }

  List& list_of(uint32_t unit) {
    if (lists_.empty()) {
      lists_.resize(units_);
      nodes_.reserve(units_);
      nodes_.resize(1);
    }
    return lists_[unit];
  }

  void copy_list(uint32_t unit, const GlobalReaders& other, uint32_t from, uint32_t lanes) {
    List& list = list_of(unit);
    std::vector<Entry> newest_first;
    for (uint32_t at = other.lists_[from].head; at; at = other.nodes_[at].next) {
      newest_first.push_back(other.nodes_[at].entry.moved_by(lanes));
    }
    for (size_t i = newest_first.size(); i-- > 0;) push(list, newest_first[i]);
    list.last_cluster = other.lists_[from].last_cluster;
  }

  // Where a reader of the list is of the same warp, and `now` can stand for it.
  bool replace_own(const List& list, const Entry& now, const Actor& actor, int lane) {
    for (uint32_t at = list.head; at; at = nodes_[at].next) {
      Entry& entry = nodes_[at].entry;
      const bool same_warp =
          entry.cluster == now.cluster && entry.record.agent() == now.record.agent();
      if (!same_warp || !entry.takes(now, actor, lane)) continue;
      if (!entry.merge(now)) entry = now;
      return true;
    }
    return false;
  }

  uint32_t oldest_of(const List& list) const {
    uint32_t at = list.head;
    while (nodes_[at].next) at = nodes_[at].next;
    return at;
  }

  void push(List& list, const Entry& now) {
    uint32_t node = free_;
    if (node) {
      free_ = nodes_[node].next;
    } else {
      node = static_cast<uint32_t>(nodes_.size());
      nodes_.emplace_back();
    }
    nodes_[node] = {now, list.head};
    list.head = node;
    ++list.count;
  }

  void free_list(uint32_t unit) {
    List& list = lists_[unit];
    if (!list.head) return;
    nodes_[oldest_of(list)].next = free_;
    free_ = list.head;
    list = {};
  }

  uint32_t units_ = 0;
  std::vector<std::array<Entry, 2>> entries_;
  std::vector<List> lists_;  // by unit; empty until one is needed
  std::vector<Node> nodes_;
  uint32_t free_ = 0;
};

}  // namespace gpu_emulator::check
