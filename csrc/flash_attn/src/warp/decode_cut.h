// How the host cuts a decode call into CTAs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/error.h"
#include "common/flash.h"
#include "common/split_heuristic.h"
#include "warp/decode_plan.h"
#include "warp/launch_plan.h"

namespace flash {

// Of a sequence's key-value head.
inline int64_t query_rows(const Flash_fwd_params& p) {
  return p.seqlen_q * (p.h / std::max<int64_t>(p.h_k, 1));
}

// Whether rows of the keys and the values x and y are the same distance from each other everywhere.
// Strides may differ where there is one row.
inline bool same_rows(const Flash_fwd_params& p, const Operand& x, const Operand& y) {
  const int64_t rows = p.block_table != nullptr ? p.page_size : p.seqlen_k;
  return (p.k_entries <= 1 || x.batch_stride == y.batch_stride) &&
         (rows <= 1 || x.row_stride == y.row_stride) &&
         (p.h_k <= 1 || x.head_stride == y.head_stride);
}

// Whether V's rows are the first columns of K's.
inline bool is_v_within_k(const Flash_fwd_params& p) {
  return p.v.ptr == p.k.ptr && p.d_v <= p.d && same_rows(p, p.k, p.v);
}

// What of a kernel the cut depends on.
struct DecodeTiling {
  int rows, block_keys;  // of a CTA
  UnitSizes units;
  int64_t slots;  // CTAs that run at a time
};

struct DecodeCut {
  int64_t rows;           // query_rows
  int64_t tiles_of_head;  // of these
  int64_t heads;          // of all sequences, and those of no sequence
  int max_units;
  int ctas_per_tile;

  DecodeCut(const Flash_fwd_params& p, const DecodeTiling& tiling) {
    constexpr int64_t kLargest = std::numeric_limits<int>::max();
    rows = query_rows(p);
    tiles_of_head = std::max<int64_t>((rows + tiling.rows - 1) / tiling.rows, 1);
    heads = (p.b + (p.cu_seqlens_q != nullptr ? 1 : 0)) * p.h_k;
    require(rows <= kLargest, "seqlen_q * num_heads / num_heads_k is too large");
    max_units = max_unit_count(static_cast<int>(p.seqlen_k),
                               static_cast<int>(std::min(p.num_splits, kLargest)),
                               tiling.block_keys, tiling.units);
    ctas_per_tile = flash::ctas_per_tile(tiles(), max_units, tiling.slots);
    require(ctas() <= kLargest, "batch_size * num_heads is too large");
  }

  int64_t tiles() const { return tiles_of_head * heads; }
  int64_t ctas() const { return tiles() * ctas_per_tile; }
  bool is_shared() const { return ctas_per_tile > 1; }
};

// All of a plan but the workspace.
inline void plan_decode(const Flash_fwd_params& p, const DecodeCut& cut, const IndexBounds& bounds,
                        DecodePlan& plan) {
  plan_attention(p, bounds, plan);
  plan.tiles = static_cast<int>(cut.tiles_of_head);
  plan.ctas_per_tile = cut.ctas_per_tile;
  plan.max_units = cut.max_units;
  plan.num_splits =
      static_cast<int>(std::min<int64_t>(p.num_splits, std::numeric_limits<int>::max()));
  plan.group = FastDivide::by(static_cast<int>(p.h / p.h_k));
}

// Results of units in the workspace: outputs, states, arrivals.
struct UnitStorage {
  int64_t rows;        // of all units
  int64_t head_dim_v;  // of an output
  int64_t arrivals;    // counters

  size_t output_bytes() const { return static_cast<size_t>(rows * head_dim_v) * sizeof(float); }
  size_t state_bytes() const { return static_cast<size_t>(rows) * sizeof(RowState); }
  size_t bytes() const {
    return output_bytes() + state_bytes() + static_cast<size_t>(arrivals) * sizeof(uint32_t);
  }

  void place(void* workspace, DecodePlan& plan) const {
    auto* outputs = static_cast<char*>(workspace);
    char* states = outputs + output_bytes();
    plan.unit_outputs = reinterpret_cast<float*>(outputs);
    plan.unit_states = reinterpret_cast<RowState*>(states);
    plan.arrivals = reinterpret_cast<uint32_t*>(states + state_bytes());
  }
};

}  // namespace flash
