#pragma once

#include <cstddef>
#include <optional>
#include <span>

namespace gpu_emulator::fatbin {

// Decodes one LZ4 block (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md) into
// `output`. Returns the bytes written, nothing if the block is damaged or does not fit.
std::optional<size_t> decode_lz4_block(std::span<const std::byte> block,
                                       std::span<std::byte> output);

}  // namespace gpu_emulator::fatbin
