// C = A B^T of one 64 x 64 x 64 tile with every operand layout of wgmma, by CuTe's layouts,
// descriptors and instructions. Every kernel takes A [64][64], B [64][64] (bf16) and C [64][64].

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using Element = cutlass::bfloat16_t;
using GMMA::Major;

constexpr int kExtent = 64;
using TileShape = Shape<Int<kExtent>, Int<kExtent>>;

template <class AtomA, class AtomB, Major kMajorA, Major kMajorB, bool kAInRegisters>
__device__ void multiply(const Element* a, const Element* b, float* c) {
  using Operation =
      std::conditional_t<kAInRegisters, SM90_64x64x16_F32BF16BF16_RS<Major::K, kMajorB>,
                         SM90_64x64x16_F32BF16BF16_SS<kMajorA, kMajorB>>;
  __shared__ alignas(1024) Element storage[2][kExtent * kExtent];
  auto sA = make_tensor(make_smem_ptr(storage[0]), tile_to_shape(AtomA{}, TileShape{}));
  auto sB = make_tensor(make_smem_ptr(storage[1]), tile_to_shape(AtomB{}, TileShape{}));
  for (int i = threadIdx.x; i < kExtent * kExtent; i += blockDim.x) {
    sA(i / kExtent, i % kExtent) = a[i];
    sB(i / kExtent, i % kExtent) = b[i];
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  auto mma = make_tiled_mma(Operation{});
  auto thread = mma.get_slice(threadIdx.x);
  auto accumulators = partition_fragment_C(mma, TileShape{});
  auto tB = thread.partition_fragment_B(sB);
  clear(accumulators);
  auto run = [&](auto& tA) {
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    for (int k = 0; k < size<2>(tA); ++k) gemm(mma, tA(_, _, k), tB(_, _, k), accumulators);
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
  };
  if constexpr (kAInRegisters) {
    auto in_shared = thread.partition_A(sA);
    auto tA = make_fragment_like<Element>(in_shared);
    for (int i = 0; i < size(tA); ++i) tA(i) = in_shared(i);
    run(tA);
  } else {
    auto tA = thread.partition_fragment_A(sA);
    run(tA);
  }
  auto gC = make_tensor(make_gmem_ptr(c), TileShape{}, Stride<Int<kExtent>, _1>{});
  copy(accumulators, thread.partition_C(gC));
}

#define LAYOUTS(SWIZZLE)                                                                           \
  extern "C" __global__ void ss_k_##SWIZZLE(const Element* a, const Element* b, float* c) {        \
    multiply<GMMA::Layout_K_##SWIZZLE##_Atom<Element>, GMMA::Layout_K_##SWIZZLE##_Atom<Element>,   \
             Major::K, Major::K, false>(a, b, c);                                                  \
  }                                                                                                \
  extern "C" __global__ void ss_mn_##SWIZZLE(const Element* a, const Element* b, float* c) {       \
    multiply<GMMA::Layout_MN_##SWIZZLE##_Atom<Element>, GMMA::Layout_MN_##SWIZZLE##_Atom<Element>, \
             Major::MN, Major::MN, false>(a, b, c);                                                \
  }                                                                                                \
  extern "C" __global__ void rs_mn_##SWIZZLE(const Element* a, const Element* b, float* c) {       \
    multiply<GMMA::Layout_K_##SWIZZLE##_Atom<Element>, GMMA::Layout_MN_##SWIZZLE##_Atom<Element>,  \
             Major::K, Major::MN, true>(a, b, c);                                                  \
  }

LAYOUTS(INTER)
LAYOUTS(SW32)
LAYOUTS(SW64)
LAYOUTS(SW128)
