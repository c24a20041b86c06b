#pragma once

// Ranges of host memory that serve as device memory, and host memory that kernels may touch.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"

namespace gpu_emulator::driver {

struct Allocation {
  enum class Kind { kDevice, kManaged, kHost, kRegistered, kModule };
  Kind kind = Kind::kDevice;
  int device = 0;        // whose context made it
  uint64_t context = 0;  // handle of that context
  uint64_t begin = 0, bytes = 0;
  unsigned flags = 0;
  uint64_t id = 0;  // never used again
  // Of kDevice: what has been written. The host writes to the other kinds unseen.
  std::shared_ptr<DefinedBytes> defined = nullptr;

  bool is_visible_everywhere() const { return kind != Kind::kDevice && kind != Kind::kModule; }
  bool is_host() const { return kind == Kind::kHost || kind == Kind::kRegistered; }
};

class Allocations {
 public:
  explicit Allocations(std::vector<MemoryMap*> devices) : devices_(std::move(devices)) {}

  // New memory, filled with 0xff: read before it is written, it holds NaN in every format. Throws
  // std::bad_alloc.
  Allocation& create(Allocation::Kind kind, int device, uint64_t context, uint64_t bytes,
                     const std::string& what);
  // Memory of the caller's. Nothing if a part of it is there already.
  Allocation* add_registered(int device, uint64_t context, uint64_t begin, uint64_t bytes,
                             bool read_only);
  bool remove(uint64_t begin);
  void remove_of_context(uint64_t context);

  // The allocation that holds [address, address + bytes), null if there is none.
  const Allocation* find(uint64_t address, uint64_t bytes = 1) const;
  // Whether any byte of the range belongs to one.
  bool overlaps(uint64_t begin, uint64_t bytes) const;
  uint64_t device_bytes(int device) const;  // in use

 private:
  struct Entry {
    Allocation allocation;
    std::unique_ptr<std::byte, void (*)(std::byte*)> storage;  // null of registered memory
  };
  Allocation& insert(Entry entry, bool writable, const std::string& what);

  std::vector<MemoryMap*> devices_;
  std::map<uint64_t, Entry> entries_;
  uint64_t last_id_ = 0;
};

}  // namespace gpu_emulator::driver
