#pragma once

// Members of Shadow; see shadow.h.

namespace gpu_emulator::check {

template <class Readers>
void Shadow<Readers>::reset(uint64_t base) {
  base_ = base;
  std::fill(cell_writes_.begin(), cell_writes_.end(), Record());
  std::fill(granule_writes_.begin(), granule_writes_.end(), Record());
  std::fill(has_granule_readers_.begin(), has_granule_readers_.end(), uint8_t{0});
  cell_readers_.reset();
  granule_readers_.reset();
  details_.clear();
  flight_reads_.clear();
}

template <class Readers>
void Shadow<Readers>::check_order(const Context& c, const Previous& previous,
                                  const Place& place) const {
  if (previous.record.in_flight()) {
    c.reporter.conflict(c.actor, c.lane, previous, place);
    return;
  }
  if (c.actor.comes_after(previous, c.lane)) {
    if (is_async(c.actor.state) && previous.is_write && !c.actor.is_fenced(previous, c.lane)) {
      c.reporter.missing_fence(c.actor, c.lane, previous, place);
    }
    return;
  }
  if (is_strong(c.actor.state) && is_strong(previous.record.state())) return;
  const bool one_instruction = previous.is_write && c.actor.is_write &&
                               previous.record.same_moment(c.actor.record(previous.record.lane()));
  if (one_instruction &&
      c.reporter.same_value(c.actor, c.lane, static_cast<int>(previous.record.lane()))) {
    return;
  }
  c.reporter.conflict(c.actor, c.lane, previous, place);
}

template <class Readers>
template <class R>
inline void Shadow<Readers>::check_readers(const Context& c, const R& readers, uint32_t unit,
                                           const Place& place) const {
  readers.for_each(unit, c.actor.order->cluster->index,
                   [&](const Previous& previous) { check(c, previous, place); });
}

template <class Readers>
inline void Shadow<Readers>::check_flight_reads(const Context& c, uint32_t cell) const {
  if (flight_reads_.empty() || !c.actor.orders_accesses) return;
  const auto found = flight_reads_.find(cell);
  if (found == flight_reads_.end()) return;
  c.reporter.conflict(c.actor, c.lane, found->second.reader, cell_place(cell));
}

// ------------------------------------------------------------------------------------------ cells

template <class Readers>
inline uint64_t Shadow<Readers>::read_cell(const Context& c, uint32_t cell) {
  uint64_t undefined = 0;
  if (cell_writes_.empty()) {
    undefined = starts_undefined_ ? 0xffff : 0;
  } else {
    const Record write = cell_writes_[cell];
    if (write.state() != AccessState::kNone) check(c, cell_write(cell, c), cell_place(cell));
    if (write.has_granules()) {
      for (uint32_t k = 0; k < kGranulesPerCell; ++k) {
        undefined |= uint64_t{read_granule(c, cell * kGranulesPerCell + k)} << k * kGranuleBytes;
      }
      return undefined;
    }
    if (write.empty() && starts_undefined_) undefined = 0xffff;
  }
  if (Readers::kHasClusters) split_line(cell / kCellsPerLine);
  if (!cell_readers_.add(cell, c.actor, c.lane)) {
    for (uint32_t k = 0; k < kGranulesPerCell; ++k) {
      read_granule(c, cell * kGranulesPerCell + k);
    }
  }
  return undefined;
}

// Whether all accesses to the cell so far are known to come before a write of the generic proxy,
// and none was to its granules.
template <class Readers>
inline bool Shadow<Readers>::is_free(const Actor& actor, uint32_t cell) const {
  const Record write = cell_writes_[cell];
  if (is_async(actor.state) || write.has_granules() || !flight_reads_.empty()) return false;
  if (!has_granule_readers_.empty() && has_granule_readers_[cell]) return false;
  if (Readers::kHasClusters || (!write.empty() && !actor.knows(write))) return false;
  return !cell_readers_.any(cell) || cell_readers_.all_known(cell, actor);
}

template <class Readers>
void Shadow<Readers>::write_any_cell(const Context& c, uint32_t cell, Record record) {
  write_cell(c, cell, record);
}

template <class Readers>
inline void Shadow<Readers>::write_cell(const Context& c, uint32_t cell, Record record) {
  const Record write = cell_writes_[cell];
  const Place place = cell_place(cell);
  if (write.state() != AccessState::kNone) check(c, cell_write(cell, c), place);
  if (cell_readers_.any(cell)) check_readers(c, cell_readers_, cell, place);
  check_flight_reads(c, cell);
  const bool has_readers = !has_granule_readers_.empty() && has_granule_readers_[cell];
  if (write.has_granules() || has_readers) {
    for (uint32_t k = 0; k < kGranulesPerCell; ++k) {
      const uint32_t granule = cell * kGranulesPerCell + k;
      write_granule(c, granule, record);
      granule_writes_[granule] = Record();
    }
    if (has_readers) has_granule_readers_[cell] = 0;
  }
  cell_readers_.clear(cell);
  cell_writes_[cell] = record;
  if (Readers::kHasClusters) {
    cell_clusters_[cell] = static_cast<uint32_t>(c.actor.order->cluster->index);
  }
}

// --------------------------------------------------------------------------------------- granules

template <class Readers>
inline uint32_t Shadow<Readers>::undefined_bytes(uint32_t granule) const {
  if (cell_writes_.empty()) return starts_undefined_ ? 0xf : 0;
  const Record record = granule_writes_[granule];
  if (record.empty()) {
    const bool written = cell_writes_[granule / kGranulesPerCell].state() != AccessState::kNone;
    return starts_undefined_ && !written ? 0xf : 0;
  }
  if (record.state() == AccessState::kDetailed) return details_.at(granule).undefined;
  return (record.undefined() & 1 ? 0x3 : 0) | (record.undefined() & 2 ? 0xc : 0);
}

template <class Readers>
inline void Shadow<Readers>::mark_granule(uint32_t granule, Record record) {
  granule_writes_[granule] = record;
  cell_writes_[granule / kGranulesPerCell].set_has_granules();
}

template <class Readers>
inline void Shadow<Readers>::check_cell_for_granule(const Context& c, uint32_t granule) const {
  const uint32_t cell = granule / kGranulesPerCell;
  if (!cell_writes_.empty() && cell_writes_[cell].state() != AccessState::kNone) {
    check(c, cell_write(cell, c), cell_place(cell));
  }
  if (!c.actor.is_write) return;
  if (cell_readers_.any(cell)) check_readers(c, cell_readers_, cell, cell_place(cell));
  check_flight_reads(c, cell);
}

template <class Readers>
inline uint32_t Shadow<Readers>::read_granule(const Context& c, uint32_t granule) {
  check_cell_for_granule(c, granule);
  if (!granule_writes_.empty()) {
    const Record write = granule_writes_[granule];
    if (write.state() == AccessState::kDetailed) return access_detail(c, granule, 0xf, 0);
    if (!write.empty()) check(c, granule_write(granule, c), granule_place(granule));
  }
  const uint32_t undefined = undefined_bytes(granule);
  if (!granule_readers_.add(granule, c.actor, c.lane)) {
    make_detail(c, granule);
    return access_detail(c, granule, 0xf, 0);
  }
  if (has_granule_readers_.empty()) has_granule_readers_.resize(cells_);
  has_granule_readers_[granule / kGranulesPerCell] = 1;
  return undefined;
}

// Leaves the record of the granule's cell alone.
template <class Readers>
inline void Shadow<Readers>::write_granule(const Context& c, uint32_t granule, Record record) {
  const Record write = granule_writes_[granule];
  if (write.state() == AccessState::kDetailed) {
    access_detail(c, granule, 0xf, 0);
    details_.erase(granule);
  } else {
    const Place place = granule_place(granule);
    if (!write.empty()) check(c, granule_write(granule, c), place);
    if (granule_readers_.any(granule)) check_readers(c, granule_readers_, granule, place);
  }
  granule_readers_.clear(granule);
  granule_writes_[granule] = record;
  if (Readers::kHasClusters) {
    granule_clusters_[granule] = static_cast<uint32_t>(c.actor.order->cluster->index);
  }
}

// ----------------------------------------------------------------------------------------- detail

template <class Readers>
inline typename Shadow<Readers>::Detail& Shadow<Readers>::make_detail(const Context& c,
                                                                      uint32_t granule) {
  allocate_writes();
  Detail& detail = details_[granule];
  const Record write = granule_writes_[granule];
  if (write.state() == AccessState::kDetailed) return detail;
  detail.entries.clear();
  detail.undefined = undefined_bytes(granule);
  if (!write.empty()) detail.entries.push_back({granule_write(granule, c), 0xf});
  granule_readers_.for_each(granule, c.actor.order->cluster->index, [&](const Previous& previous) {
    detail.entries.push_back({previous, 0xf});
  });
  granule_readers_.clear(granule);
  mark_granule(granule, Record(AccessState::kDetailed, 1, 0, 0, 0));
  return detail;
}

// Some bytes of a granule kept in detail; those of the actor's write are undefined where
// `undefined` says so. Returns the bytes that were undefined before.
template <class Readers>
inline uint32_t Shadow<Readers>::access_detail(const Context& c, uint32_t granule, uint32_t bytes,
                                               uint32_t undefined) {
  check_cell_for_granule(c, granule);
  Detail& detail = details_[granule];
  const uint32_t before = detail.undefined & bytes;
  for (auto& entry : detail.entries) {
    const uint32_t common = entry.bytes & bytes;
    if (!common) continue;
    if (c.actor.is_write || entry.previous.is_write) {
      check(c, entry.previous, granule_place(granule));
    }
    // A write replaces what it overwrites; a read replaces older reads that it has seen.
    const bool replaced = c.actor.is_write ||
                          (!entry.previous.is_write && c.actor.comes_after(entry.previous, c.lane));
    if (replaced) entry.bytes &= ~bytes;
  }
  std::erase_if(detail.entries, [](const auto& entry) { return entry.bytes == 0; });
  detail.entries.push_back({{c.actor.record(c.lane), is_async(c.actor.state) ? ~0u : 1u << c.lane,
                             c.actor.order->cluster->index, c.actor.is_write},
                            bytes});
  if (c.actor.is_write) detail.undefined = (detail.undefined & ~bytes) | (undefined & bytes);
  return before;
}

// ------------------------------------------------------------------------------------- the
// accesses

template <class Readers>
uint64_t Shadow<Readers>::read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                               Reporter& reporter) {
  const Context c{actor, lane, reporter};
  const uint32_t end = offset + bytes;
  uint64_t undefined = 0;
  for (uint32_t at = offset; at < end;) {
    const uint32_t shift = std::min(at - offset, 63u);
    if (at % kCellBytes == 0 && end - at >= kCellBytes) {
      undefined |= read_cell(c, at / kCellBytes) << shift;
      at += kCellBytes;
      continue;
    }
    const uint32_t granule = at / kGranuleBytes, first = at % kGranuleBytes;
    const uint32_t count = std::min(kGranuleBytes - first, end - at);
    if (count == kGranuleBytes) {
      undefined |= uint64_t{read_granule(c, granule)} << shift;
    } else {
      make_detail(c, granule);
      const uint32_t mask = ((1u << count) - 1) << first;
      undefined |= uint64_t{access_detail(c, granule, mask, 0) >> first} << shift;
    }
    at += count;
  }
  return undefined;
}

// Whether nothing but the reader is to be kept of a read of the cell by the generic proxy.
template <class Readers>
inline bool Shadow<Readers>::is_known_write(const Actor& actor, uint32_t cell) const {
  const Record write = cell_writes_.empty() ? Record() : cell_writes_[cell];
  if (write.empty()) return !starts_undefined_;
  if (write.has_granules() || !actor.knows(write)) return false;
  return !Readers::kHasClusters || cell_clusters_[cell] == actor.order->cluster->index;
}

// Whether each granule of the cell was written on its own, all defined, and the writes are known to
// come before a read of the generic proxy.
template <class Readers>
inline bool Shadow<Readers>::are_known_granules(const Actor& actor, uint32_t cell) const {
  if (Readers::kHasClusters || cell_writes_.empty()) return false;
  const Record write = cell_writes_[cell];
  if (!write.has_granules()) return false;
  bool known = write.state() == AccessState::kNone || actor.knows(write);
  for (uint32_t k = 0; k < kGranulesPerCell; ++k) {
    const Record granule = granule_writes_[cell * kGranulesPerCell + k];
    known &= !granule.empty() && !granule.undefined() && actor.knows(granule);
  }
  return known;
}

template <class Readers>
inline void Shadow<Readers>::add_granule_readers(const Context& c, uint32_t cell,
                                                 typename Readers::Own& own) {
  for (uint32_t k = 0; k < kGranulesPerCell; ++k) {
    const uint32_t granule = cell * kGranulesPerCell + k;
    if (!own.add(granule, c.lane)) read_granule(c, granule);
  }
  if (has_granule_readers_.empty()) has_granule_readers_.resize(cells_);
  has_granule_readers_[cell] = 1;
}

// One lane of read_cells() that is not the plain case: the bytes that were undefined.
template <class Readers>
uint64_t Shadow<Readers>::read_one_cell(const Context& c, uint32_t cell, CellReads& reads) {
  if (is_known_write(c.actor, cell) && reads.own.add(cell, c.lane)) return 0;
  if (!are_known_granules(c.actor, cell)) return read_cell(c, cell);
  if (!reads.of_granules) reads.of_granules.emplace(granule_readers_, c.actor);
  add_granule_readers(c, cell, *reads.of_granules);
  return 0;
}

// Whether an actor's reads of neighbouring cells by neighbouring lanes are alike: nothing is known
// of some of its warp's lanes only, nor of other clusters.
template <class Readers>
inline bool Shadow<Readers>::takes_lines(const Actor& actor) const {
  return Readers::kHasClusters && cell_writes_.empty() && !starts_undefined_ && actor.common &&
         !actor.common->foreign && actor.common->own.partial.empty();
}

template <class Readers>
inline uint32_t Shadow<Readers>::read_lines(const Actor& actor, uint32_t mask,
                                            const uint64_t* address) {
  constexpr uint32_t kLanes = (1u << kCellsPerLine) - 1;
  typename Readers::Own own(line_readers_, actor);
  uint32_t done = 0;
  for (uint32_t left = mask; left;) {
    const int lane = exec::first_lane(left);
    const uint64_t* at = address + lane;
    const bool is_line = (left >> lane & kLanes) == kLanes && at[0] % kLineBytes == 0 &&
                         at[1] == at[0] + kCellBytes && at[2] == at[0] + 2 * kCellBytes &&
                         at[3] == at[0] + 3 * kCellBytes;
    const auto line = static_cast<uint32_t>((at[0] - base_) / kLineBytes);
    if (is_line && (lines_split_.empty() || !lines_split_[line])) {
      own.add(line, lane);
      done |= kLanes << lane;
      left &= ~(kLanes << lane);
    } else {
      left &= left - 1;
    }
  }
  return done;
}

// The line's readers become those of its cells, where they stay.
template <class Readers>
void Shadow<Readers>::split_line(uint32_t line) {
  if constexpr (Readers::kHasClusters) {
    if (lines_split_.empty()) lines_split_.resize(cells_ / kCellsPerLine);
    if (lines_split_[line]) return;
    lines_split_[line] = true;
    for (uint32_t k = 0; k < kCellsPerLine; ++k) {
      cell_readers_.copy(line * kCellsPerLine + k, line_readers_, line, k);
    }
  }
}

template <class Readers>
void Shadow<Readers>::split_lines() {
  for (uint32_t line = 0; line < cells_ / kCellsPerLine; ++line) split_line(line);
}

template <class Readers>
template <class F>
void Shadow<Readers>::read_cells(const Actor& actor, uint32_t mask, const uint64_t* address,
                                 Reporter& reporter, F&& f) {
  if (takes_lines(actor)) mask &= ~read_lines(actor, mask, address);
  if (!mask) return;
  CellReads reads(cell_readers_, actor);
  exec::for_each_lane(mask, [&](int lane) __attribute__((always_inline)) {
    const auto cell = static_cast<uint32_t>((address[lane] - base_) / kCellBytes);
    if (Readers::kHasClusters) split_line(cell / kCellsPerLine);
    const uint64_t write = write_of(cell);
    if (write == reads.known || is_known_write(actor, cell)) {
      if (!Readers::kHasClusters || !write) reads.known = write;
      if (reads.own.add_alone(cell, lane)) return;
    }
    const uint64_t undefined = read_one_cell({actor, lane, reporter}, cell, reads);
    if (undefined) f(lane, undefined);
  });
}

template <class Readers>
uint64_t Shadow<Readers>::write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                                uint64_t undefined, Reporter& reporter) {
  allocate_writes();
  const Context c{actor, lane, reporter};
  const uint32_t end = offset + bytes;
  const Record record = actor.record(lane);
  uint64_t before = 0;
  for (uint32_t at = offset; at < end;) {
    const uint32_t shift = std::min(at - offset, 63u);
    const auto still = static_cast<uint32_t>(undefined >> shift);
    if (at % kCellBytes == 0 && end - at >= kCellBytes && !(still & 0xffff)) {
      write_cell(c, at / kCellBytes, record);
      at += kCellBytes;
      continue;
    }
    const uint32_t granule = at / kGranuleBytes, first = at % kGranuleBytes;
    const uint32_t count = std::min(kGranuleBytes - first, end - at);
    const uint32_t unknown = still & ((1u << count) - 1);
    const bool by_halves = unknown == 0 || unknown == 0x3 || unknown == 0xc || unknown == 0xf;
    before |= uint64_t{undefined_bytes(granule)} << shift;
    if (count == kGranuleBytes && by_halves) {
      check_cell_for_granule(c, granule);
      Record own = record;
      own.set_undefined((unknown & 1) | (unknown >> 2 & 2));
      write_granule(c, granule, own);
      cell_writes_[granule / kGranulesPerCell].set_has_granules();
    } else {
      make_detail(c, granule);
      access_detail(c, granule, ((1u << count) - 1) << first, unknown << first);
    }
    at += count;
  }
  return before;
}

// As is_free(), of a write to one granule.
template <class Readers>
inline bool Shadow<Readers>::is_free_granule(const Actor& actor, uint32_t granule) const {
  const uint32_t cell = granule / kGranulesPerCell;
  const Record write = cell_writes_[cell], own = granule_writes_[granule];
  if (Readers::kHasClusters || is_async(actor.state) || !flight_reads_.empty()) return false;
  if (write.state() != AccessState::kNone && !actor.knows(write)) return false;
  if (!own.empty() && !actor.knows(own)) return false;
  if (cell_readers_.any(cell) && !cell_readers_.all_known(cell, actor)) return false;
  return !granule_readers_.any(granule) || granule_readers_.all_known(granule, actor);
}

template <class Readers>
void Shadow<Readers>::write_granules(const Actor& actor, uint32_t mask, const uint64_t* address,
                                     Reporter& reporter) {
  allocate_writes();
  const Record first = actor.record(0);
  exec::for_each_lane(mask, [&](int lane) __attribute__((always_inline)) {
    const auto offset = static_cast<uint32_t>(address[lane] - base_);
    const uint32_t granule = offset / kGranuleBytes;
    if (!is_free_granule(actor, granule)) {
      write(actor, lane, offset, kGranuleBytes, 0, reporter);
      return;
    }
    granule_readers_.clear(granule);
    mark_granule(granule, first.of_lane(static_cast<uint32_t>(lane)));
  });
}

template <class Readers>
void Shadow<Readers>::begin_write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                                  AccessState flight, Reporter& reporter) {
  allocate_writes();
  const Context c{actor, lane, reporter};
  const Record record(flight, actor.order->stamp, actor.site, actor.order->agent,
                      static_cast<uint32_t>(lane));
  const uint32_t end = offset + bytes;
  for (uint32_t at = offset; at < end;) {
    if (at % kCellBytes == 0 && end - at >= kCellBytes) {
      write_cell(c, at / kCellBytes, record);
      at += kCellBytes;
      continue;
    }
    const uint32_t granule = at / kGranuleBytes;
    check_cell_for_granule(c, granule);
    write_granule(c, granule, record);
    cell_writes_[granule / kGranulesPerCell].set_has_granules();
    at = (granule + 1) * kGranuleBytes;
  }
}

template <class Readers>
void Shadow<Readers>::begin_write_cells(const Actor& actor, uint32_t mask, const uint64_t* address,
                                        AccessState flight, Reporter& reporter) {
  allocate_writes();
  const Record first(flight, actor.order->stamp, actor.site, actor.order->agent, 0);
  exec::for_each_lane(mask, [&](int lane) __attribute__((always_inline)) {
    const auto cell = static_cast<uint32_t>((address[lane] - base_) / kCellBytes);
    const Record record = first.of_lane(static_cast<uint32_t>(lane));
    if (is_free(actor, cell)) {
      cell_readers_.clear(cell);
      cell_writes_[cell] = record;
    } else {
      write_any_cell({actor, lane, reporter}, cell, record);
    }
  });
}

template <class Readers>
void Shadow<Readers>::finish_write_cells(const Actor& actor, uint32_t mask, const uint64_t* address,
                                         uint64_t* undefined, Reporter& reporter) {
  allocate_writes();
  exec::for_each_lane(mask, [&](int lane) __attribute__((always_inline)) {
    const auto offset = static_cast<uint32_t>(address[lane] - base_);
    Record& write = cell_writes_[offset / kCellBytes];
    if (!undefined[lane] && write.is_flight_of(actor.order->agent, static_cast<uint32_t>(lane))) {
      write = Record(actor.state, actor.order->stamp, write.site(), actor.order->agent,
                     static_cast<uint32_t>(lane));
    } else {
      finish_write(actor, lane, offset, kCellBytes, undefined[lane], reporter);
      undefined[lane] = 0;
    }
  });
}

template <class Readers>
void Shadow<Readers>::finish_write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                                   uint64_t undefined, Reporter& reporter) {
  allocate_writes();
  const uint32_t end = offset + bytes;
  auto is_own = [&](Record record) {
    return record.is_flight_of(actor.order->agent, static_cast<uint32_t>(lane));
  };
  auto finished = [&](Record flight) {
    return Record(actor.state, actor.order->stamp, flight.site(), actor.order->agent,
                  static_cast<uint32_t>(lane));
  };
  for (uint32_t at = offset; at < end;) {
    const uint32_t cell = at / kCellBytes, granule = at / kGranuleBytes;
    const uint32_t shift = std::min(at - offset, 63u);
    const auto still = static_cast<uint32_t>(undefined >> shift);
    if (is_own(cell_writes_[cell]) && at % kCellBytes == 0 && end - at >= kCellBytes) {
      const Record done = finished(cell_writes_[cell]);
      cell_writes_[cell] = done;
      for (uint32_t k = 0; (still & 0xffff) && k < kGranulesPerCell; ++k) {
        Record part = done;
        const uint32_t unknown = still >> k * kGranuleBytes & 0xf;
        part.set_undefined((unknown & 0x3 ? 1 : 0) | (unknown & 0xc ? 2 : 0));
        mark_granule(granule + k, part);
      }
      at += kCellBytes;
    } else if (is_own(granule_writes_[granule])) {
      Record done = finished(granule_writes_[granule]);
      done.set_undefined((still & 0x3 ? 1 : 0) | (still & 0xc ? 2 : 0));
      granule_writes_[granule] = done;
      at = (granule + 1) * kGranuleBytes;
    } else {  // begun by nobody
      const uint32_t count = std::min((granule + 1) * kGranuleBytes, end) - at;
      write(actor, lane, at, count, still, reporter);
      at += count;
    }
  }
}

template <class Readers>
void Shadow<Readers>::begin_read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                                 Reporter& reporter) {
  const Context c{actor, lane, reporter};
  for (uint32_t cell = offset / kCellBytes; cell * kCellBytes < offset + bytes; ++cell) {
    if (!cell_writes_.empty()) {
      if (cell_writes_[cell].state() != AccessState::kNone) {
        check(c, cell_write(cell, c), cell_place(cell));
      }
      for (uint32_t k = 0; cell_writes_[cell].has_granules() && k < kGranulesPerCell; ++k) {
        const uint32_t granule = cell * kGranulesPerCell + k;
        if (granule_writes_[granule].state() == AccessState::kDetailed) {
          access_detail(c, granule, 0xf, 0);
        } else if (!granule_writes_[granule].empty()) {
          check(c, granule_write(granule, c), granule_place(granule));
        }
      }
    }
    FlightRead& flight = flight_reads_[cell];
    Record record(AccessState::kAsyncFlight, actor.order->stamp, actor.site, actor.order->agent,
                  static_cast<uint32_t>(lane));
    flight.reader = {record, 1u << lane, actor.order->cluster->index, false};
    ++flight.count;
  }
}

template <class Readers>
uint64_t Shadow<Readers>::finish_read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                                      Reporter& reporter) {
  Actor issued = actor;
  for (uint32_t cell = offset / kCellBytes; cell * kCellBytes < offset + bytes; ++cell) {
    const auto found = flight_reads_.find(cell);
    if (found == flight_reads_.end()) continue;
    issued.site = found->second.reader.record.site();
    if (--found->second.count == 0) flight_reads_.erase(found);
  }
  return read(issued, lane, offset, bytes, reporter);
}

}  // namespace gpu_emulator::check
