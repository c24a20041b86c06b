#include "sm80/launch_decode.h"

#include <algorithm>
#include <limits>

#include "base/cuda_driver/device.h"
#include "common/split_heuristic.h"
#include "sm80/decode_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "warp/launch_plan.h"

namespace flash::sm80 {
namespace {

// Of more rows the prefill kernel reads keys less often; of fewer keys there is little to share.
constexpr int64_t kMaxDecodeRows = 64;
constexpr int64_t kMinDecodeKeys = 512;

// More new rows are appended sooner by a launch of their own, with many CTAs.
constexpr int64_t kMaxNewRows = 16;

// Of a sequence's key-value head.
int64_t query_rows(const Flash_fwd_params& p) {
  return p.seqlen_q * (p.h / std::max<int64_t>(p.h_k, 1));
}

// Of a cache only the capacity is known here.
bool is_cache_call(const Flash_fwd_params& p) {
  return p.cu_seqlens_q == nullptr &&
         (p.seqused_k != nullptr || p.block_table != nullptr || p.cache_batch_idx != nullptr ||
          p.leftpad_k != nullptr || p.knew.ptr != nullptr);
}

const DecodeKernel& choose(const Flash_fwd_params& p) {
  const DecodeTile& tile = decode_tile_of(p.d, p.d_v);
  const DecodeConfig wanted{p.dtype, tile.head_dim, tile.head_dim_v};
  return *std::find_if(kDecodeKernels.begin(), kDecodeKernels.end(),
                       [&](const DecodeKernel& kernel) { return kernel.config == wanted; });
}

// How a call is cut into CTAs, and what several of them leave in the workspace for the last.
struct Cut {
  int64_t rows;           // query_rows
  int64_t tiles_of_head;  // of these
  int64_t heads;          // of all sequences, and those of no sequence
  int max_units;
  int ctas_per_tile;

  int64_t tiles() const { return tiles_of_head * heads; }
  int64_t ctas() const { return tiles() * ctas_per_tile; }
  bool is_shared() const { return ctas_per_tile > 1; }
  int64_t unit_rows() const { return std::min<int64_t>(rows, kDecodeRows); }
  int64_t kept_rows() const { return is_shared() ? tiles() * max_units * unit_rows() : 0; }
};

Cut cut(const Flash_fwd_params& p, const DecodeKernel& kernel) {
  Cut c{};
  c.rows = query_rows(p);
  c.tiles_of_head = std::max<int64_t>((c.rows + kDecodeRows - 1) / kDecodeRows, 1);
  c.heads = (p.b + (p.cu_seqlens_q != nullptr ? 1 : 0)) * p.h_k;
  const auto largest = std::numeric_limits<int>::max();
  require(c.rows <= largest, "seqlen_q * num_heads / num_heads_k is too large");
  c.max_units =
      max_unit_count(static_cast<int>(p.seqlen_k),
                     static_cast<int>(std::min<int64_t>(p.num_splits, largest)), kernel.block_keys);
  c.ctas_per_tile = ctas_per_tile(
      c.tiles(), c.max_units, p.target.device->cta_slots(kernel.ctas_per_sm, kernel.shared_bytes));
  require(c.ctas() <= largest, "batch_size * num_heads is too large");
  return c;
}

// The workspace: outputs, states, arrivals.
size_t output_bytes(const Cut& c, const DecodeKernel& kernel) {
  return static_cast<size_t>(c.kept_rows()) * kernel.config.head_dim_v * sizeof(float);
}
size_t state_bytes(const Cut& c) { return static_cast<size_t>(c.kept_rows()) * sizeof(RowState); }
size_t arrival_bytes(const Cut& c) {
  return c.is_shared() ? static_cast<size_t>(c.tiles()) * sizeof(uint32_t) : 0;
}

void place_workspace(const Cut& c, const DecodeKernel& kernel, void* workspace,
                     DecodeLaunch& launch) {
  auto* outputs = static_cast<char*>(workspace);
  char* states = outputs + output_bytes(c, kernel);
  launch.unit_outputs = reinterpret_cast<float*>(outputs);
  launch.unit_states = reinterpret_cast<RowState*>(states);
  launch.arrivals = reinterpret_cast<uint32_t*>(states + state_bytes(c));
}

DecodeLaunch plan(const Flash_fwd_params& p, const Cut& c, const DecodeKernel& kernel) {
  DecodeLaunch launch{};
  plan_attention(p, index_bounds(p), launch);
  launch.tiles = static_cast<int>(c.tiles_of_head);
  launch.ctas_per_tile = c.ctas_per_tile;
  launch.max_units = c.max_units;
  launch.num_splits =
      static_cast<int>(std::min<int64_t>(p.num_splits, std::numeric_limits<int>::max()));
  launch.group = FastDivide::by(static_cast<int>(p.h / p.h_k));
  launch.v_within_k = p.v.ptr == p.k.ptr && p.d_v <= p.d && same_rows(p, p.k, p.v);
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  launch.unit_rows = static_cast<int>(c.unit_rows());
  if (p.knew.ptr != nullptr && decode_appends(p)) {
    launch.new_rows = static_cast<int>(p.seqlen_knew);
    launch.append = plan_append(p);
  }
  if (c.is_shared()) place_workspace(c, kernel, p.workspace.ptr, launch);
  return launch;
}

}  // namespace

bool takes_decode(const Flash_fwd_params& p) {
  const int64_t rows = query_rows(p);
  if (decode_tile_of(p.d, p.d_v).warps_share_keys) return true;
  return rows > 0 && rows <= kMaxDecodeRows && (p.seqlen_k >= kMinDecodeKeys || is_cache_call(p)) &&
         p.p_dropout == 0.f && p.bias.ptr == nullptr;
}

bool decode_appends(const Flash_fwd_params& p) {
  const int64_t rows = query_rows(p);
  return takes_decode(p) && 0 < rows && rows <= kDecodeRows && p.seqlen_knew <= kMaxNewRows;
}

size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p) {
  if (p.b == 0 || !takes_decode(p)) return 0;
  const DecodeKernel& kernel = choose(p);
  const Cut c = cut(p, kernel);
  return output_bytes(c, kernel) + state_bytes(c) + arrival_bytes(c);
}

void launch_decode(const Flash_fwd_params& p) {
  const DecodeKernel& kernel = choose(p);
  const Cut c = cut(p, kernel);
  FwdParams params{p, p, p, p};
  DecodeLaunch launch = plan(p, c, kernel);
  if (c.is_shared())
    p.target.device->clear(launch.arrivals, static_cast<size_t>(c.tiles()), p.target.stream);
  void* args[] = {&params, &launch};
  p.target.device->launch(kernel.image,
                          {static_cast<unsigned>(c.ctas()), static_cast<unsigned>(kernel.threads),
                           static_cast<unsigned>(kernel.shared_bytes)},
                          p.target.stream, args);
}

}  // namespace flash::sm80
