// How decoding cuts a sequence's keys into units, and how many CTAs share the units of a tile.
//
// Units are a function of the sequence alone, and their results are merged in the order of keys:
// the bits of a result do not depend on the rest of the batch, the device or the schedule. How many
// CTAs share them may: it decides only who computes which unit.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

inline constexpr int kMinUnitKeys = 128, kMaxUnitKeys = 1024;
inline constexpr int kFewUnits = 32;  // as many as units shorter than kMaxUnitKeys may be

// Of a kernel: these, unless the results of its units are large.
struct UnitSizes {
  int least = kMinUnitKeys, most = kMaxUnitKeys, few = kFewUnits;
};

// Keys of a unit where `keys` are seen: a multiple of block_keys, which divides sizes.least.
// num_splits > 0 asks for so many units at most.
FLASH_INLINE constexpr int unit_keys(int keys, int num_splits, int block_keys,
                                     const UnitSizes& sizes = {}) {
  if (num_splits > 0) {
    const int share = (keys + num_splits - 1) / num_splits;
    return share <= block_keys ? block_keys : (share + block_keys - 1) / block_keys * block_keys;
  }
  int unit = sizes.least;
  while (unit < sizes.most && static_cast<int64_t>(unit) * sizes.few < keys) unit *= 2;
  return unit;
}

FLASH_INLINE constexpr int unit_count(int keys, int num_splits, int block_keys,
                                      const UnitSizes& sizes = {}) {
  const int unit = unit_keys(keys, num_splits, block_keys, sizes);
  return (keys + unit - 1) / unit;
}

// The most units of any sequence of at most `keys` keys.
FLASH_INLINE constexpr int max_unit_count(int keys, int num_splits, int block_keys,
                                          const UnitSizes& sizes = {}) {
  const int of_all = unit_count(keys, num_splits, block_keys, sizes);
  // Shorter sequences have shorter units.
  const int shortest = num_splits > 0 ? block_keys : sizes.least;
  const int most = num_splits > 0 ? num_splits : sizes.few;
  const int of_shorter =
      (keys + shortest - 1) / shortest < most ? (keys + shortest - 1) / shortest : most;
  return of_all > of_shorter ? of_all : of_shorter;
}

// CTAs for each of `tiles` tiles of `units` units, where `slots` CTAs run at a time: the fewest of
// those that take the shortest time, a unit's time being 1 and that of a CTA's start and end 1.
FLASH_INLINE constexpr int ctas_per_tile(int64_t tiles, int units, int64_t slots) {
  int best = 1;
  int64_t best_time = INT64_MAX;
  for (int ctas = 1; ctas <= units; ++ctas) {
    const int64_t waves = (tiles * ctas + slots - 1) / slots;
    const int64_t time = waves * ((units + ctas - 1) / ctas + 1);
    if (time >= best_time) continue;
    best = ctas;
    best_time = time;
  }
  return best;
}

// Units [begin, end) of one of the CTAs that share a tile; empty for those beyond `sharers`.
struct UnitShare {
  int begin, end;
  int sharers;  // CTAs with units, or the one of a tile without units
};

FLASH_INLINE constexpr UnitShare share_of(int cta, int ctas, int units) {
  const int sharers = units < ctas ? (units < 1 ? 1 : units) : ctas;
  if (cta >= sharers) return {0, 0, sharers};
  return {static_cast<int>(static_cast<int64_t>(cta) * units / sharers),
          static_cast<int>(static_cast<int64_t>(cta + 1) * units / sharers), sharers};
}

}  // namespace flash
