// What every function of the C interfaces does: no exception passes, and the sentence of an error
// is kept for flash_attn_last_error.
#pragma once

#include "base/error.h"

namespace flash {

// Of the last call of this thread that failed; "" if none has.
const char* last_error();

// The status of the exception that is being handled; keeps its sentence.
flash_attn_status status_of_exception() noexcept;

template <typename Body>
flash_attn_status guarded(const Body& body) noexcept {
  try {
    body();
    return FLASH_ATTN_OK;
  } catch (...) {
    return status_of_exception();
  }
}

template <typename Pointer>
void require_pointer(const Pointer* pointer, const char* name) {
  require(pointer != nullptr, name, " must not be NULL");
}

}  // namespace flash
