// Sequences by index tensors that nobody has checked: an element is a fault if, and only if, it
// leads out of the tensors.
#include <gtest/gtest.h>

#include <climits>
#include <vector>

#include "common/bounded_sequence.h"

namespace flash_test {
namespace {

using flash::fault_of;
using flash::IndexFaults;
using flash::IndexTensor;
using flash::Sequence;

const std::vector<int> kElements = {INT_MIN, INT_MIN + 1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, INT_MAX};

struct Found {
  Sequence sequence;
  IndexFaults faults;
};

Found find(const flash::SequenceGeometry& p, int batch, int max_cached) {
  Found found{};
  found.sequence = flash::bounded_sequence(p, batch, max_cached, found.faults);
  return found;
}

TEST(BoundedSequence, PackedRowsLieWithinTheTensors) {
  for (const int begin : kElements)
    for (const int end : kElements) {
      const int32_t cu_seqlens[] = {0, begin, end};
      flash::SequenceGeometry p;
      p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens;
      p.seqlen_q = 3;
      p.seqlen_k = 2;
      p.total_q = p.total_k = 6;
      const auto [s, faults] = find(p, 1, max_cached(p, {}, {}));
      const bool is_part = 0 <= begin && begin <= end && end <= 6;
      const int64_t length = int64_t{end} - begin;
      EXPECT_EQ(faults, fault_of(IndexTensor::kCuSeqlensQ, !is_part || length > 3) |
                            fault_of(IndexTensor::kCuSeqlensK, !is_part || length > 2))
          << begin << " " << end;
      EXPECT_EQ(s.seqlen_q, is_part && length <= 3 ? length : 0);
      EXPECT_EQ(s.seqlen_k, is_part && length <= 2 ? length : 0);
    }
}

TEST(BoundedSequence, FirstSequenceStartsAtZero) {
  const int32_t cu_seqlens[] = {1, 2};
  flash::SequenceGeometry p;
  p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens;
  p.seqlen_q = p.seqlen_k = p.total_q = p.total_k = 6;
  EXPECT_EQ(find(p, 0, 6).faults,
            fault_of(IndexTensor::kCuSeqlensQ, true) | fault_of(IndexTensor::kCuSeqlensK, true));
}

TEST(BoundedSequence, UsedKeysAndLeftPaddingLieWithinTheSequence) {
  for (const bool is_packed : {false, true})
    for (const int used : kElements)
      for (const int leftpad : kElements) {
        const int32_t cu_seqlens_k[] = {0, 5};
        flash::SequenceGeometry p;
        if (is_packed) p.cu_seqlens_k = cu_seqlens_k;
        p.seqlen_q = 1;
        p.seqlen_k = 8;
        p.total_k = 8;
        p.k_entries = 1;
        p.seqlen_knew = is_packed ? 0 : 2;
        p.seqused_k = &used;
        p.leftpad_k = &leftpad;
        const auto [s, faults] = find(p, 0, max_cached(p, {}, {}));
        const bool wrong_used = used < 0 || used > (is_packed ? 5 : 6);
        const bool wrong_leftpad = !wrong_used && (leftpad < 0 || leftpad > used);
        EXPECT_EQ(
            faults,
            fault_of(is_packed ? IndexTensor::kSequsedK : IndexTensor::kCacheSeqlens, wrong_used) |
                fault_of(is_packed ? IndexTensor::kLeftpadK : IndexTensor::kCacheLeftpad,
                         wrong_leftpad))
            << used << " " << leftpad;
        EXPECT_EQ(s.seqlen_k, faults != 0 ? 0 : used + p.seqlen_knew - leftpad);
      }
}

TEST(BoundedSequence, CacheEntriesExist) {
  for (const int entry : kElements) {
    flash::SequenceGeometry p;
    p.seqlen_k = 8;
    p.k_entries = 5;
    p.cache_batch_idx = &entry;
    EXPECT_EQ(find(p, 0, 8).faults, fault_of(IndexTensor::kCacheBatchIdx, entry < 0 || entry >= 5));
  }
}

TEST(BoundedSequence, RowsInUseLeaveRoomForNewOnesAndTheirAngles) {
  flash::SequenceGeometry p;
  p.seqlen_q = 10;
  p.seqlen_k = 100;
  p.seqlen_knew = 4;
  EXPECT_EQ(max_cached(p, {}, {}), 96);
  flash::AppendParams rotary;
  rotary.rotary_dim = 16;
  rotary.rotary_rows = 100;
  EXPECT_EQ(max_cached(p, {}, rotary), 96);  // all queries have the first new row's position
  flash::ScoreParams causal;
  causal.window_right = 0;
  EXPECT_EQ(max_cached(p, causal, rotary), 90);
  const int32_t table = 0;
  p.block_table = &table;
  p.page_size = 16;
  p.max_pages = 3;
  EXPECT_EQ(max_cached(p, {}, {}), 44);
}

}  // namespace
}  // namespace flash_test
