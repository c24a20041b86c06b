// Which elements dropout keeps: a pure function of (seed, offset, row, column), equal on every
// backend. flash_attn/layer_norm.h describes it.
#pragma once

#include <cstdint>

#include "base/philox.h"

namespace flash::layer_norm {

struct KeepRule {
  static constexpr int kColumns = 8;  // of one counter

  uint64_t key = 0;
  uint32_t offset = 0;
  uint32_t threshold = 0;  // 16 random bits below it keep
  float rescale = 0.f;     // 1 / (1 - p), or 0
  bool enabled = false;

  static KeepRule make(double p, uint64_t seed, uint64_t offset) {
    return {.key = seed ^ (offset >> 32 << 32),
            .offset = static_cast<uint32_t>(offset),
            .threshold = static_cast<uint32_t>((1. - p) * 65536. + 0.5),
            .rescale = p < 1. ? static_cast<float>(1. / (1. - p)) : 0.f,
            .enabled = p > 0.};
  }
};

// The two summands that dropout works on.
enum class Branch : uint32_t { kX0, kX1 };

}  // namespace flash::layer_norm
