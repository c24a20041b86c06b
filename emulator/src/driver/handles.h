#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

namespace gpu_emulator::driver {

// Objects behind the driver API's opaque handles. A handle is a number that is never used again, so
// that a stale, wild or foreign one is always noticed; it is not an address.
template <typename Object, typename Handle>
class Handles {
 public:
  Handles(uint64_t kind, const char* name) : kind_(kind << kKindShift), name_(name) {}

  const char* name() const { return name_; }  // of an object, for reports

  Handle add(std::shared_ptr<Object> object) {
    const uint64_t number = kind_ | (++last_ << 4);
    objects_.emplace(number, std::move(object));
    return reinterpret_cast<Handle>(number);
  }
  // Null for what is not a live handle of this kind.
  std::shared_ptr<Object> find(Handle handle) const {
    const auto it = objects_.find(reinterpret_cast<uint64_t>(handle));
    return it == objects_.end() ? nullptr : it->second;
  }
  bool remove(Handle handle) { return objects_.erase(reinterpret_cast<uint64_t>(handle)) > 0; }

  template <typename Predicate>
  void remove_if(Predicate predicate) {
    std::erase_if(objects_, [&](const auto& entry) { return predicate(*entry.second); });
  }
  template <typename Body>
  void for_each(Body body) {
    for (auto& [number, object] : objects_) body(*object);
  }

 private:
  static constexpr int kKindShift = 40;
  uint64_t kind_;
  const char* name_;
  uint64_t last_ = 0;
  std::unordered_map<uint64_t, std::shared_ptr<Object>> objects_;
};

}  // namespace gpu_emulator::driver
