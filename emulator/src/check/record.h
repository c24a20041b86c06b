#pragma once

// What shadow memory keeps of one access, in 64 bits. 0: none yet.

#include <cstdint>

namespace gpu_emulator::check {

enum class AccessState : uint8_t {
  kNone,
  kPlain,        // weak access by the generic proxy
  kStrong,       // relaxed, acquire, release or atomic (PTX ISA 8.4)
  kAsync,        // complete access of the async proxy
  kCopyFlight,   // destination of a cp.async not waited for
  kAsyncFlight,  // destination of an operation of the async proxy not complete
  kDetailed,     // see the list of the granule
  kAsyncStrong,  // complete reduction of the async proxy: relaxed and atomic
};

inline bool is_async(AccessState state) {
  return state == AccessState::kAsync || state == AccessState::kAsyncStrong;
}
inline bool is_strong(AccessState state) {
  return state == AccessState::kStrong || state == AccessState::kAsyncStrong;
}

class Record {
 public:
  Record() = default;
  Record(AccessState state, uint32_t stamp, uint32_t site, uint32_t agent, uint32_t lane)
      : bits_(uint64_t{stamp} | uint64_t{site} << kSiteShift | uint64_t{agent} << kAgentShift |
              uint64_t{lane} << kLaneShift | uint64_t(state) << kStateShift) {}

  static constexpr uint32_t kLongestStamp = (1u << 26) - 1;
  static constexpr uint32_t kUnknownSite = (1u << 18) - 1;

  uint64_t bits() const { return bits_; }
  bool empty() const { return bits_ == 0; }
  uint32_t stamp() const { return bits_ & kLongestStamp; }
  uint32_t site() const { return bits_ >> kSiteShift & kUnknownSite; }
  uint32_t agent() const { return bits_ >> kAgentShift & 0x1ff; }
  uint32_t lane() const { return bits_ >> kLaneShift & 31; }
  AccessState state() const { return static_cast<AccessState>(bits_ >> kStateShift & 7); }
  bool in_flight() const {
    return state() == AccessState::kCopyFlight || state() == AccessState::kAsyncFlight;
  }
  bool is_flight_of(uint32_t of_agent, uint32_t of_lane) const {
    return in_flight() && agent() == of_agent && lane() == of_lane;
  }
  // Of writes: halves of the granule (bit 0: the low one) that hold an undefined value.
  uint32_t undefined() const { return bits_ >> kUndefinedShift & 3; }
  void set_undefined(uint32_t halves) {
    bits_ = (bits_ & ~(uint64_t{3} << kUndefinedShift)) | uint64_t{halves} << kUndefinedShift;
  }
  // Of reads: more lanes than lane() of the warp.
  bool has_more_lanes() const { return bits_ >> kUndefinedShift & 1; }
  void set_more_lanes(bool more) { set_undefined(more); }
  // Of a cell: some of its granules have been written on their own since the launch began.
  bool has_granules() const { return bits_ >> kGranulesShift & 1; }
  void set_has_granules() { bits_ |= uint64_t{1} << kGranulesShift; }
  // Of a record of lane 0: the same of another.
  Record of_lane(uint32_t lane) const {
    Record record = *this;
    record.bits_ |= uint64_t{lane} << kLaneShift;
    return record;
  }
  // The same of the lane `lanes` further on.
  Record moved_by(uint32_t lanes) const {
    Record record = *this;
    record.bits_ += uint64_t{lanes} << kLaneShift;
    return record;
  }
  // Warp, stamp and state: not the lane, and not where in the code.
  uint64_t moment() const {
    constexpr uint64_t kMoment =
        uint64_t{kLongestStamp} | uint64_t{0x1ff} << kAgentShift | uint64_t{7} << kStateShift;
    return bits_ & kMoment;
  }
  // moment(), and whether some granules were written on their own.
  uint64_t moment_and_granules() const {
    return moment() | (bits_ & uint64_t{1} << kGranulesShift);
  }
  // The same access but for where in the code it was.
  bool same_moment(Record other) const {
    constexpr uint64_t kSite = uint64_t{kUnknownSite} << kSiteShift;
    return ((bits_ ^ other.bits_) & ~kSite) == 0;
  }

 private:
  static constexpr int kSiteShift = 26, kAgentShift = 44, kLaneShift = 53, kStateShift = 58,
                       kUndefinedShift = 61, kGranulesShift = 63;
  uint64_t bits_ = 0;
};
static_assert(sizeof(Record) == 8);

}  // namespace gpu_emulator::check
