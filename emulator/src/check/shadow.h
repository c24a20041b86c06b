#pragma once

// Shadow memory of a region: the last write of each unit and its readers since. Units are cells of
// 16 bytes, for accesses that take whole cells (ldmatrix rows, cp.async, vectors, the async proxy),
// and granules of 4 bytes for all others; granules of which lanes touch different bytes are kept in
// detail, byte by byte, as lists. A conflict is two accesses to a byte, one of them a write,
// neither of which happened before the other (FastTrack, Flanagan and Freund, PLDI 2009); two
// strong accesses do not conflict (PTX ISA 8.7.1).
//
// Of global memory that nothing has written yet, what four neighbouring lanes read at once in four
// neighbouring cells (cp.async of rows) is kept once, for the line of 64 bytes, until another
// access needs to know it cell by cell.
//
// An older entry of the other unit size may stay behind a newer one: it happened before the newer
// one, or that would have been reported; so it makes no false report.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "actor.h"

namespace gpu_emulator::check {

inline constexpr uint32_t kCellBytes = 16, kGranuleBytes = 4, kGranulesPerCell = 4;
inline constexpr uint32_t kCellsPerLine = 4, kLineBytes = kCellsPerLine * kCellBytes;

template <class Readers>
class Shadow {
 public:
  // starts_undefined: bytes never written hold no value. bytes: of global memory, whole lines.
  Shadow(exec::Space space, uint64_t base, uint32_t bytes, bool starts_undefined)
      : space_(space),
        base_(base),
        cells_((bytes + kCellBytes - 1) / kCellBytes),
        starts_undefined_(starts_undefined) {
    cell_readers_.allocate(cells_);
    granule_readers_.allocate(cells_ * kGranulesPerCell);
    line_readers_.allocate(cells_ / kCellsPerLine);
  }

  // As new, for a region of the same size; keeps the memory.
  void reset(uint64_t base);

  // Both return bit k set where byte k (of the first 64) was undefined before the access.
  uint64_t read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes, Reporter& reporter);
  uint64_t write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes, uint64_t undefined,
                 Reporter& reporter);

  // read() of one cell for each lane of mask (ldmatrix, 16-byte vectors, cp.async) at
  // address[lane] - base, by the generic proxy. Calls f(lane, undefined bytes) where some are.
  template <class F>
  void read_cells(const Actor& actor, uint32_t mask, const uint64_t* address, Reporter& reporter,
                  F&& f);

  // write() of one granule of defined bytes for each lane of mask, at address[lane] - base.
  void write_granules(const Actor& actor, uint32_t mask, const uint64_t* address,
                      Reporter& reporter);

  // The destination of an asynchronous operation until it is complete, and then.
  void begin_write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                   AccessState flight, Reporter& reporter);
  void finish_write(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                    uint64_t undefined, Reporter& reporter);
  // Both of one cell for each lane of mask (cp.async), at address[lane] - base.
  void begin_write_cells(const Actor& actor, uint32_t mask, const uint64_t* address,
                         AccessState flight, Reporter& reporter);
  void finish_write_cells(const Actor& actor, uint32_t mask, const uint64_t* address,
                          uint64_t* undefined, Reporter& reporter);
  // The source of an operation of the async proxy.
  void begin_read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                  Reporter& reporter);
  uint64_t finish_read(const Actor& actor, int lane, uint32_t offset, uint32_t bytes,
                       Reporter& reporter);

 private:
  struct Detail {
    struct Entry {
      Previous previous;
      uint32_t bytes;
    };
    std::vector<Entry> entries;
    uint32_t undefined;  // bytes
  };
  struct Context {  // of one access
    const Actor& actor;
    int lane;
    Reporter& reporter;
  };

  Place cell_place(uint32_t cell) const {
    return {space_, base_ + uint64_t{cell} * kCellBytes, kCellBytes};
  }
  Place granule_place(uint32_t granule) const {
    return {space_, base_ + uint64_t{granule} * kGranuleBytes, kGranuleBytes};
  }

  void allocate_writes() {
    if (!cell_writes_.empty()) return;
    cell_writes_.resize(cells_);
    granule_writes_.resize(cells_ * kGranulesPerCell);
    if (!Readers::kHasClusters) return;
    split_lines();
    cell_clusters_.resize(cells_);
    granule_clusters_.resize(cells_ * kGranulesPerCell);
  }
  Previous cell_write(uint32_t cell, const Context& c) const {
    const Record record = cell_writes_[cell];
    return {record, 1u << record.lane(),
            Readers::kHasClusters ? cell_clusters_[cell] : c.actor.order->cluster->index, true};
  }
  Previous granule_write(uint32_t granule, const Context& c) const {
    const Record record = granule_writes_[granule];
    return {record, 1u << record.lane(),
            Readers::kHasClusters ? granule_clusters_[granule] : c.actor.order->cluster->index,
            true};
  }

  void check(const Context& c, const Previous& previous, const Place& place) const {
    if (!c.actor.orders_accesses) return;
    if (c.actor.knows(previous.record) && previous.cluster == c.actor.order->cluster->index &&
        !is_async(c.actor.state)) {
      return;
    }
    check_order(c, previous, place);
  }
  void check_order(const Context& c, const Previous& previous, const Place& place) const;
  template <class R>
  void check_readers(const Context& c, const R& readers, uint32_t unit, const Place& place) const;
  void check_flight_reads(const Context& c, uint32_t cell) const;

  // What read_cells() keeps from lane to lane. Neighbours in memory were mostly written together.
  struct CellReads {
    CellReads(Readers& readers, const Actor& actor) : own(readers, actor) {}
    typename Readers::Own own;
    std::optional<typename Readers::Own> of_granules = {};
    uint64_t known = ~uint64_t{0};  // write_of() of the last cell whose write was found known
  };

  // Record::moment_and_granules() of the cell's last write.
  uint64_t write_of(uint32_t cell) const {
    return cell_writes_.empty() ? 0 : cell_writes_[cell].moment_and_granules();
  }
  // Lanes of mask whose cells were kept by lines.
  uint32_t read_lines(const Actor& actor, uint32_t mask, const uint64_t* address);
  bool takes_lines(const Actor& actor) const;
  void split_line(uint32_t line);
  void split_lines();
  [[gnu::noinline]] uint64_t read_one_cell(const Context& c, uint32_t cell, CellReads& reads);
  [[gnu::noinline]] void write_any_cell(const Context& c, uint32_t cell, Record record);
  bool is_known_write(const Actor& actor, uint32_t cell) const;
  bool is_free(const Actor& actor, uint32_t cell) const;
  bool is_free_granule(const Actor& actor, uint32_t granule) const;
  bool are_known_granules(const Actor& actor, uint32_t cell) const;
  void add_granule_readers(const Context& c, uint32_t cell, typename Readers::Own& own);
  uint64_t read_cell(const Context& c, uint32_t cell);
  void write_cell(const Context& c, uint32_t cell, Record record);
  uint32_t read_granule(const Context& c, uint32_t granule);
  void write_granule(const Context& c, uint32_t granule, Record record);
  uint32_t access_detail(const Context& c, uint32_t granule, uint32_t bytes, uint32_t undefined);
  Detail& make_detail(const Context& c, uint32_t granule);
  void mark_granule(uint32_t granule, Record record);
  uint32_t undefined_bytes(uint32_t granule) const;
  void check_cell_for_granule(const Context& c, uint32_t granule) const;

  exec::Space space_;
  uint64_t base_;
  uint32_t cells_;
  bool starts_undefined_;
  std::vector<Record> cell_writes_, granule_writes_;
  std::vector<uint32_t> cell_clusters_, granule_clusters_;
  Readers cell_readers_, granule_readers_;
  Readers line_readers_;                      // lanes: those of the line's first cell
  std::vector<bool> lines_split_;             // their readers are in cell_readers_
  std::vector<uint8_t> has_granule_readers_;  // by cell
  std::unordered_map<uint32_t, Detail> details_;
  struct FlightRead {
    Previous reader;
    int count;
  };
  std::unordered_map<uint32_t, FlightRead> flight_reads_;  // by cell
};

}  // namespace gpu_emulator::check

#include "shadow.inc.h"
