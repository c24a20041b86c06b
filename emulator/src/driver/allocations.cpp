#include "allocations.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace gpu_emulator::driver {
namespace {

constexpr size_t kAlignment = 512;  // of cuMemAlloc: at least 256
constexpr int kPoison = 0xff;

using Storage = std::unique_ptr<std::byte, void (*)(std::byte*)>;

Storage no_storage() {
  return Storage(nullptr, [](std::byte*) {});
}

Storage new_storage(uint64_t bytes) {
  if (bytes > SIZE_MAX - kAlignment) throw std::bad_alloc();
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
  if (!memory) throw std::bad_alloc();
  std::memset(memory, kPoison, rounded);
  return Storage(memory, [](std::byte* pointer) { std::free(pointer); });
}

}  // namespace

Allocation& Allocations::insert(Entry entry, bool writable, const std::string& what) {
  Allocation& allocation = entry.allocation;
  allocation.id = ++last_id_;
  for (size_t device = 0; device < devices_.size(); ++device) {
    if (!allocation.is_visible_everywhere() && static_cast<int>(device) != allocation.device) {
      continue;
    }
    devices_[device]->add({allocation.begin, allocation.begin + allocation.bytes, true, writable,
                           what, allocation.defined});
  }
  const uint64_t begin = allocation.begin;
  return entries_.insert_or_assign(begin, std::move(entry)).first->second.allocation;
}

Allocation& Allocations::create(Allocation::Kind kind, int device, uint64_t context, uint64_t bytes,
                                const std::string& what) {
  Storage storage = new_storage(bytes);
  const auto begin = reinterpret_cast<uint64_t>(storage.get());
  std::shared_ptr<DefinedBytes> defined;
  if (kind == Allocation::Kind::kDevice) defined = std::make_shared<DefinedBytes>(begin, bytes);
  return insert(
      {{kind, device, context, begin, bytes, 0, 0, std::move(defined)}, std::move(storage)}, true,
      what);
}

Allocation* Allocations::add_registered(int device, uint64_t context, uint64_t begin,
                                        uint64_t bytes, bool read_only) {
  if (overlaps(begin, bytes)) return nullptr;
  Entry entry = {{Allocation::Kind::kRegistered, device, context, begin, bytes, 0, 0},
                 no_storage()};
  return &insert(std::move(entry), !read_only,
                 "registered host memory of " + std::to_string(bytes) + " bytes");
}

bool Allocations::remove(uint64_t begin) {
  const auto it = entries_.find(begin);
  if (it == entries_.end()) return false;
  for (MemoryMap* device : devices_) device->remove(begin);
  entries_.erase(it);
  return true;
}

void Allocations::remove_of_context(uint64_t context) {
  std::vector<uint64_t> doomed;
  for (const auto& [begin, entry] : entries_) {
    if (entry.allocation.context == context) doomed.push_back(begin);
  }
  for (uint64_t begin : doomed) remove(begin);
}

const Allocation* Allocations::find(uint64_t address, uint64_t bytes) const {
  auto it = entries_.upper_bound(address);
  if (it == entries_.begin()) return nullptr;
  const Allocation& allocation = std::prev(it)->second.allocation;
  const uint64_t offset = address - allocation.begin;
  return offset < allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

bool Allocations::overlaps(uint64_t begin, uint64_t bytes) const {
  if (find(begin)) return true;
  const auto it = entries_.lower_bound(begin);
  return it != entries_.end() && it->first - begin < bytes;
}

uint64_t Allocations::device_bytes(int device) const {
  uint64_t sum = 0;
  for (const auto& [begin, entry] : entries_) {
    const Allocation& allocation = entry.allocation;
    if (allocation.device == device && !allocation.is_host()) sum += allocation.bytes;
  }
  return sum;
}

}  // namespace gpu_emulator::driver
