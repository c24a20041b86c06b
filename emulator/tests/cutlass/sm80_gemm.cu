// C = A B^T in bf16 for sm_80: tiles of 64 x 64 x 32, two stages of cp.async, ldmatrix, mma.sync,
// by CuTe's copies and matrix instructions.

#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

using namespace cute;
using Element = cutlass::bfloat16_t;

constexpr int kM = 64, kN = 64, kK = 32, kStages = 2, kThreads = 128;
using Swizzled =
    decltype(composition(Swizzle<2, 3, 3>{}, Layout<Shape<_8, Int<kK>>, Stride<Int<kK>, _1>>{}));
using LayoutA = decltype(tile_to_shape(Swizzled{}, Shape<Int<kM>, Int<kK>, Int<kStages>>{}));
using LayoutB = decltype(tile_to_shape(Swizzled{}, Shape<Int<kN>, Int<kK>, Int<kStages>>{}));

extern "C" __global__ void __launch_bounds__(kThreads)
    sm80_gemm(const Element* a, const Element* b, float* c, int n, int k) {
  __shared__ alignas(128) Element storage_a[kM * kK * kStages], storage_b[kN * kK * kStages];
  auto gA = make_tensor(make_gmem_ptr(a + blockIdx.x * kM * k),
                        make_shape(Int<kM>{}, Int<kK>{}, k / kK), make_stride(k, _1{}, Int<kK>{}));
  auto gB = make_tensor(make_gmem_ptr(b + blockIdx.y * kN * k),
                        make_shape(Int<kN>{}, Int<kK>{}, k / kK), make_stride(k, _1{}, Int<kK>{}));
  auto gC = make_tensor(make_gmem_ptr(c + blockIdx.x * kM * n + blockIdx.y * kN),
                        make_shape(Int<kM>{}, Int<kN>{}), make_stride(n, _1{}));
  auto sA = make_tensor(make_smem_ptr(storage_a), LayoutA{});
  auto sB = make_tensor(make_smem_ptr(storage_b), LayoutB{});

  auto loader = make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, Element>{},
                                Layout<Shape<Int<kThreads / 4>, _4>, Stride<_4, _1>>{},
                                Layout<Shape<_1, _8>>{});
  auto load = loader.get_slice(threadIdx.x);
  auto from_a = load.partition_S(gA);
  auto from_b = load.partition_S(gB);
  auto to_a = load.partition_D(sA);
  auto to_b = load.partition_D(sB);
  auto fetch = [&](int step) {
    copy(loader, from_a(_, _, _, step), to_a(_, _, _, step % kStages));
    copy(loader, from_b(_, _, _, step), to_b(_, _, _, step % kStages));
    cp_async_fence();
  };

  auto mma = make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{}, Layout<Shape<_2, _2, _1>>{},
                            Tile<_32, _32, _16>{});
  auto thread = mma.get_slice(threadIdx.x);
  auto tA = thread.partition_fragment_A(sA(_, _, 0));
  auto tB = thread.partition_fragment_B(sB(_, _, 0));
  auto accumulators = thread.make_fragment_C(thread.partition_C(gC));
  clear(accumulators);
  auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  auto read_a = copy_a.get_slice(threadIdx.x);
  auto read_b = copy_b.get_slice(threadIdx.x);
  auto in_a = read_a.partition_S(sA);
  auto in_b = read_b.partition_S(sB);
  auto out_a = read_a.retile_D(tA);
  auto out_b = read_b.retile_D(tB);

  const int steps = k / kK;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1);
    copy(copy_a, in_a(_, _, _, step % kStages), out_a);
    copy(copy_b, in_b(_, _, _, step % kStages), out_b);
    gemm(mma, tA, tB, accumulators);
  }
  copy(accumulators, thread.partition_C(gC));
}
