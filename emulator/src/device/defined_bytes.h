#pragma once

// Which bytes of a range of device memory have been written: one bit a byte. Host threads may read
// and write at once.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace gpu_emulator {

class DefinedBytes {
 public:
  // None of them at first.
  DefinedBytes(uint64_t begin, uint64_t bytes);

  // Whether it is known that all bytes are.
  bool all() const { return all_.load(std::memory_order_relaxed); }
  void set_all() { all_.store(true, std::memory_order_relaxed); }
  void set(uint64_t address, uint64_t bytes);
  // After a copy from `source`: as `from` there. from null: all its bytes are defined.
  void copy(uint64_t address, uint64_t bytes, const DefinedBytes* from, uint64_t source);
  // Bit k set where byte k is not; of the first 64 bytes.
  uint64_t undefined(uint64_t address, uint64_t bytes) const;

 private:
  static constexpr uint64_t kWordBytes = 64;
  struct Free {
    void operator()(uint64_t* words) const;
  };

  uint64_t word(uint64_t index) const;
  void change(uint64_t address, uint64_t bytes, bool defined);
  void forget(uint64_t address, uint64_t bytes);

  uint64_t begin_, bytes_;
  std::atomic<bool> all_ = false;
  std::unique_ptr<uint64_t[], Free> words_;  // pages of zeros that cost nothing until used
};

}  // namespace gpu_emulator
