// C = A B^T in bf16: tiles of 64 x 64 x 64, a producer warp that fills a pipeline by TMA, a
// consumer warpgroup, clusters of two CTAs along M that share B: each loads half of its tile for
// both. CUTLASS's TMA, barrier and pipeline classes and CuTe's descriptors.

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using Element = cutlass::bfloat16_t;

constexpr int kTile = 64, kStages = 3, kCtas = 2, kWarpgroup = 128;
using Pipeline = cutlass::PipelineTmaAsync<kStages>;
using ClusterShape = Shape<Int<kCtas>, _1, _1>;
using TileShape = Shape<Int<kTile>, Int<kTile>>;
using SharedLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, TileShape{}));

struct Storage {
  alignas(1024) Element a[kStages][kTile * kTile];
  alignas(1024) Element b[kStages][kTile * kTile];
  typename Pipeline::SharedStorage pipeline;
};

__device__ void produce(Pipeline& pipeline, Storage& storage, const CUtensorMap& a,
                        const CUtensorMap& b, int steps) {
  const auto hint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  const int rank = static_cast<int>(block_rank_in_cluster());
  constexpr int kHalf = kTile / kCtas;
  auto state = cutlass::make_producer_start_state<Pipeline>();
  for (int step = 0; step < steps; ++step, ++state) {
    pipeline.producer_acquire(state);
    auto* barrier = pipeline.producer_get_barrier(state);
    SM90_TMA_LOAD_2D::copy(&a, barrier, hint, storage.a[state.index()], step * kTile,
                           static_cast<int>(blockIdx.x) * kTile);
    SM90_TMA_LOAD_MULTICAST_2D::copy(&b, barrier, (1 << kCtas) - 1, hint,
                                     storage.b[state.index()] + rank * kHalf * kTile, step * kTile,
                                     static_cast<int>(blockIdx.y) * kTile + rank * kHalf);
  }
  pipeline.producer_tail(state);
}

__device__ void consume(Pipeline& pipeline, Storage& storage, float* c, int n, int steps) {
  auto mma = make_tiled_mma(SM90_64x64x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>{});
  const int index = static_cast<int>(threadIdx.x) - kWarpgroup;
  auto thread = mma.get_slice(index);
  auto accumulators = partition_fragment_C(mma, TileShape{});
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  cutlass::PipelineState<kStages> state;
  for (int step = 0; step < steps; ++step, ++state) {
    pipeline.consumer_wait(state);
    auto sA = make_tensor(make_smem_ptr(storage.a[state.index()]), SharedLayout{});
    auto sB = make_tensor(make_smem_ptr(storage.b[state.index()]), SharedLayout{});
    auto tA = thread.partition_fragment_A(sA);
    auto tB = thread.partition_fragment_B(sB);
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    for (int k = 0; k < size<2>(tA); ++k) {
      gemm(mma, tA(_, _, k), tB(_, _, k), accumulators);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(state);
  }
  auto gC =
      make_tensor(make_gmem_ptr(c), make_shape(Int<kTile>{}, Int<kTile>{}), make_stride(n, _1{}));
  copy(accumulators, thread.partition_C(gC));
}

extern "C" __global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(2 * kWarpgroup, 1)
    tma_gemm(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* c,
             int n, int k) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage*>(shared);
  const bool is_producer = cutlass::canonical_warp_group_idx() == 0;
  typename Pipeline::Params params;
  params.transaction_bytes = 2 * kTile * kTile * sizeof(Element);
  params.role =
      is_producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  params.is_leader = threadIdx.x == 0;
  params.num_consumers = kWarpgroup;
  Pipeline pipeline(storage.pipeline, params, ClusterShape{});
  cluster_arrive_relaxed();
  cluster_wait();
  const int steps = k / kTile;
  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    if (cutlass::canonical_warp_idx_sync() == 0 && elect_one_sync()) {
      produce(pipeline, storage, a, b, steps);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<256>();
    consume(pipeline, storage, c + blockIdx.x * kTile * n + blockIdx.y * kTile, n, steps);
  }
}
