#include "host_memory.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace gpu_emulator::driver {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMaxChunk = size_t{1} << 30;

enum class Transfer { kDone, kFault, kForbidden };

Transfer transfer(void* destination, const void* source, size_t bytes) {
  auto* to = static_cast<std::byte*>(destination);
  auto* from = static_cast<const std::byte*>(source);
  while (bytes > 0) {
    const size_t chunk = std::min(bytes, kMaxChunk);
    const iovec local = {to, chunk}, remote = {const_cast<std::byte*>(from), chunk};
    const ssize_t moved = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    if (moved < 0) {
      const bool forbidden = errno == EPERM || errno == ENOSYS;
      return forbidden ? Transfer::kForbidden : Transfer::kFault;
    }
    if (moved == 0) return Transfer::kFault;
    to += moved;
    from += moved;
    bytes -= static_cast<size_t>(moved);
  }
  return Transfer::kDone;
}

}  // namespace

bool safe_copy(void* destination, const void* source, size_t bytes) {
  switch (transfer(destination, source, bytes)) {
    case Transfer::kDone:
      return true;
    case Transfer::kFault:
      return false;
    case Transfer::kForbidden:  // a sandbox without the system call: no protection
      if (!destination || !source) return false;
      std::memcpy(destination, source, bytes);
      return true;
  }
  return false;
}

bool is_readable(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  if (first == 0 || bytes > UINTPTR_MAX - first) return false;
  for (uintptr_t at = first; at < first + bytes; at = at / kPage * kPage + kPage) {
    std::byte value;
    if (!safe_copy(&value, reinterpret_cast<const void*>(at), 1)) return false;
  }
  return true;
}

std::vector<std::byte> read_up_to(const void* begin, size_t bytes) {
  std::vector<std::byte> result;
  auto at = reinterpret_cast<uintptr_t>(begin);
  while (result.size() < bytes) {
    const size_t chunk = std::min<size_t>(bytes - result.size(), kPage - at % kPage);
    const size_t before = result.size();
    result.resize(before + chunk);
    if (at == 0 || !safe_copy(result.data() + before, reinterpret_cast<const void*>(at), chunk)) {
      result.resize(before);
      break;
    }
    at += chunk;
  }
  return result;
}

}  // namespace gpu_emulator::driver
