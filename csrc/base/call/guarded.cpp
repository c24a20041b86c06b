#include "base/call/guarded.h"

#include <cstdio>
#include <new>

namespace flash {
namespace {

// Reports of the emulated GPU are long.
thread_local char kept[8192] = "";

flash_attn_status keep_error(flash_attn_status status, const char* sentence) {
  std::snprintf(kept, sizeof(kept), "%s", sentence);
  return status;
}

}  // namespace

const char* last_error() { return kept; }

flash_attn_status status_of_exception() noexcept {
  try {
    throw;
  } catch (const ApiError& error) {
    return keep_error(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return keep_error(FLASH_ATTN_OUT_OF_MEMORY, "flash_attn ran out of memory");
  } catch (const std::exception& error) {
    return keep_error(FLASH_ATTN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return keep_error(FLASH_ATTN_INTERNAL_ERROR, "unknown error inside flash_attn");
  }
}

}  // namespace flash
