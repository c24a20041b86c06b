// The error by which a call leaves the library.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "flash_attn/types.h"

namespace flash {

// A call that is turned down. The C interface returns its status and keeps its sentence.
class ApiError : public std::exception {
 public:
  ApiError(flash_attn_status status, std::string sentence)
      : status_(status), sentence_(std::move(sentence)) {}
  flash_attn_status status() const { return status_; }
  const char* what() const noexcept override { return sentence_.c_str(); }

 private:
  flash_attn_status status_;
  std::string sentence_;
};

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw ApiError(FLASH_ATTN_INVALID_ARGUMENT, sentence.str());
}

// Costs one branch when all is well: the sentence is put together only to be thrown.
template <typename... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(parts...);
  }
}

}  // namespace flash
