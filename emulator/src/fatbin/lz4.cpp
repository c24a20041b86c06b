#include "lz4.h"

#include <cstring>

namespace gpu_emulator::fatbin {
namespace {

constexpr size_t kMinMatch = 4;

class BlockReader {
 public:
  explicit BlockReader(std::span<const std::byte> block) : block_(block) {}

  bool done() const { return position_ == block_.size(); }
  bool byte(size_t& value) {
    if (done()) return false;
    value = std::to_integer<size_t>(block_[position_++]);
    return true;
  }
  // A length of four bits, continued by bytes while they are all ones.
  bool length(size_t& value) {
    if (value != 15) return true;
    size_t more = 255;
    while (more == 255) {
      if (!byte(more)) return false;
      value += more;
    }
    return true;
  }
  bool take(size_t count, std::byte* to) {
    if (count > block_.size() - position_) return false;
    std::memcpy(to, block_.data() + position_, count);
    position_ += count;
    return true;
  }

 private:
  std::span<const std::byte> block_;
  size_t position_ = 0;
};

}  // namespace

std::optional<size_t> decode_lz4_block(std::span<const std::byte> block,
                                       std::span<std::byte> output) {
  BlockReader reader(block);
  size_t written = 0;
  for (size_t token; reader.byte(token);) {
    size_t literals = token >> 4;
    if (!reader.length(literals) || literals > output.size() - written) return std::nullopt;
    if (literals > 0 && !reader.take(literals, output.data() + written)) return std::nullopt;
    written += literals;
    if (reader.done()) return written;  // the last sequence has literals alone
    size_t low, high, match = token & 15;
    if (!reader.byte(low) || !reader.byte(high) || !reader.length(match)) return std::nullopt;
    const size_t distance = low | high << 8;
    match += kMinMatch;
    if (distance == 0 || distance > written || match > output.size() - written) {
      return std::nullopt;
    }
    // Byte by byte: a match may overlap what it writes.
    for (; match > 0; --match, ++written) output[written] = output[written - distance];
  }
  return written;
}

}  // namespace gpu_emulator::fatbin
