// Where rows of a sequence lie in pages.
#pragma once

#include <cstdint>

#include "base/fast_divide.h"

namespace flash {

struct PageTable {
  const int32_t* table;  // the sequence's row of block_table; null: not paged
  int count;             // of pages that there are
  int first_row;         // of key 0
  FastDivide size;       // rows of a page

  // f(page, row of it) of row `place` of the sequence's pages, which are in entry `index`; a page
  // that is not there is -1.
  template <class F>
  FLASH_DEVICE auto at(int place, int index, const F& f) const {
    const int page = table[index];
    const bool exists = static_cast<unsigned>(page) < static_cast<unsigned>(count);
    return f(exists ? page : -1, place - index * size.divisor);
  }
  template <class F>
  FLASH_DEVICE auto at(int place, const F& f) const {
    return at(place, size.quotient(place), f);
  }
};

}  // namespace flash
