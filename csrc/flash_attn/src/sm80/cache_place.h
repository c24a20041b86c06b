// Single rows of a sequence's keys and values.
#pragma once

#include "common/bounded_sequence.h"
#include "warp/page_table.h"

namespace flash::sm80 {

struct CachePlace {
  int64_t entry, row;  // batch entry or page, row in it
};

// Where row `index` lies, counted from the first row before left padding. Faults: there is no such
// page.
FLASH_DEVICE CachePlace place_of(const Sequence& seq, const FastDivide& page_size, int64_t pages,
                                 int index, IndexFaults& faults) {
  if (seq.pages == nullptr) return {seq.k_batch, seq.k_row + index};
  const PageTable table{seq.pages, static_cast<int>(pages), 0, page_size};
  return table.at(index, [&](int page, int row) {
    faults |= fault_of(IndexTensor::kBlockTable, page < 0);
    return CachePlace{page, row};
  });
}

}  // namespace flash::sm80
