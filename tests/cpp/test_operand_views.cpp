// Which tensors, and whose calls' q, k, v and out, tensor maps can describe.
#include "common/operand_views.h"

#include <gtest/gtest.h>

#include <functional>

namespace flash_test {
namespace {

using flash::Dtype;
using flash::StridedView;

using Dims = std::array<int64_t, flash::kMaxMappedRank>;
constexpr int64_t kTwo32 = int64_t{1} << 32, kTwo39 = int64_t{1} << 39;

StridedView view(int rank, const Dims& extents, const Dims& strides) {
  return {reinterpret_cast<void*>(0x1000), Dtype::kFloat16, rank, extents, strides};
}

TEST(CanMap, LayoutsOfAttention) {
  const struct {
    const char* what;
    StridedView view;
  } cases[] = {
      {"contiguous", view(4, {64, 4, 300, 2}, {1, 64, 256, 76800})},
      {"heads outside rows", view(4, {64, 4, 300, 2}, {1, 19200, 64, 76800})},
      {"batch inside rows", view(4, {64, 4, 300, 2}, {1, 64, 512, 256})},
      {"part of a packed projection", view(4, {64, 4, 300, 2}, {1, 64, 768, 230400})},
      {"every other row of 299", view(4, {64, 4, 150, 2}, {1, 64, 512, 299 * 256})},
      {"36 of 40 columns", view(4, {36, 4, 300, 2}, {1, 40, 160, 48000})},
      {"one head at any distance", view(4, {64, 1, 300, 1}, {1, 3, 64, 0})},
      {"one column at any distance", view(2, {1, 300}, {5, 8})},
      {"a vector", view(1, {64}, {1})},
      {"the largest", view(2, {kTwo32, 3}, {1, kTwo39 - 8})},
      {"the most rows", view(2, {8, kTwo32}, {1, 8})},
  };
  for (const auto& c : cases) EXPECT_TRUE(can_map(c.view)) << c.what;
}

TEST(CanMap, WhatTheDriverDoesNotTake) {
  const StridedView good = view(4, {64, 4, 300, 2}, {1, 64, 256, 76800});
  const struct {
    const char* what;
    std::function<void(StridedView&)> breakage;
  } cases[] = {
      {"an address off by one element", [](auto& x) { x.address = (char*)x.address + 2; }},
      {"an address off by eight bytes", [](auto& x) { x.address = (char*)x.address + 8; }},
      {"no address", [](auto& x) { x.address = nullptr; }},
      {"fp32", [](auto& x) { x.dtype = Dtype::kFloat32; }},
      {"no dimension", [](auto& x) { x.rank = 0; }},
      {"six dimensions", [](auto& x) { x.rank = 6; }},
      {"columns apart", [](auto& x) { x.strides[0] = 2; }},
      {"no columns", [](auto& x) { x.extents[0] = 0; }},
      {"no heads", [](auto& x) { x.extents[1] = 0; }},
      {"no rows", [](auto& x) { x.extents[2] = 0; }},
      {"no batch", [](auto& x) { x.extents[3] = 0; }},
      {"too many rows", [](auto& x) { x.extents[3] = kTwo32 + 1; }},
      {"a stride of 8 bytes more", [](auto& x) { x.strides[3] += 4; }},
      {"a stride of 2^40 bytes", [](auto& x) { x.strides[3] = kTwo39; }},
      {"a stride that overflows", [](auto& x) { x.strides[3] = INT64_MAX / 16 * 16; }},
      {"a negative stride", [](auto& x) { x.strides[3] = -76800; }},
      {"expanded heads", [](auto& x) { x.strides[1] = 0; }},
      {"an expanded batch", [](auto& x) { x.strides[3] = 0; }},
      {"heads that overlap", [](auto& x) { x.strides[1] = 56; }},
      {"sliding windows of rows", [](auto& x) { x.strides[3] = 150 * 256; }},
      {"two dimensions of one stride", [](auto& x) { x.strides[3] = 256; }},
  };
  ASSERT_TRUE(can_map(good));
  StridedView bytes = good;
  bytes.dtype = Dtype::kFloat8E4M3;
  EXPECT_TRUE(can_map(bytes));
  for (const auto& c : cases) {
    StridedView x = good;
    c.breakage(x);
    EXPECT_FALSE(can_map(x)) << c.what;
  }
}

// A reach beyond 2^63 does not come round to a small one.
TEST(CanMap, LargeViewsDoNotOverflow) {
  EXPECT_FALSE(can_map(view(4, {8, kTwo32, kTwo32, 2}, {1, kTwo39 - 16, kTwo39 - 8, 8})));
  EXPECT_TRUE(can_map(view(3, {8, kTwo32, 2}, {1, kTwo39 - 8, 8})));
}

// fp16 in [b, rows, heads, d] order.
flash::Operand operand(uintptr_t at, int64_t rows, int64_t heads, int64_t d) {
  return {reinterpret_cast<void*>(at), rows * heads * d, heads * d, d};
}

flash::Flash_fwd_params dense() {
  flash::Flash_fwd_params p;
  p.dtype = p.kv_dtype = p.o_dtype = Dtype::kFloat16;
  p.b = 2, p.h = 4, p.h_k = 2, p.d = 64, p.d_v = 32;
  p.seqlen_q = 100, p.seqlen_k = 200, p.total_q = 200, p.total_k = 400, p.k_entries = 2;
  p.q = operand(0x1000, 100, 4, 64);
  p.k = operand(0x2000, 200, 2, 64);
  p.v = operand(0x3000, 200, 2, 32);
  p.o = operand(0x4000, 100, 4, 32);
  return p;
}

void expect_view(const StridedView& x, uintptr_t at, const Dims& extents, const Dims& strides) {
  EXPECT_EQ(x.address, reinterpret_cast<void*>(at));
  EXPECT_EQ(x.dtype, Dtype::kFloat16);
  EXPECT_EQ(x.rank, 4);
  EXPECT_EQ(x.extents, extents);
  EXPECT_EQ(x.strides, strides);
}

TEST(OperandViews, OfADenseBatch) {
  const flash::OperandViews x = flash::operand_views(dense());
  expect_view(x.q, 0x1000, {64, 4, 100, 2}, {1, 64, 256, 25600});
  expect_view(x.k, 0x2000, {64, 2, 200, 2}, {1, 64, 128, 25600});
  expect_view(x.v, 0x3000, {32, 2, 200, 2}, {1, 32, 64, 12800});
  expect_view(x.o, 0x4000, {32, 4, 100, 2}, {1, 32, 128, 12800});
  EXPECT_TRUE(can_map(x));
}

// 200 rows of q and 400 of k, the longest sequences 100 and 200.
flash::Flash_fwd_params packed() {
  static const int32_t starts[3] = {};  // not read
  flash::Flash_fwd_params p = dense();
  p.cu_seqlens_q = p.cu_seqlens_k = starts;
  p.k_entries = 400;
  p.q.batch_stride = p.k.batch_stride = p.v.batch_stride = p.o.batch_stride = 0;
  return p;
}

TEST(OperandViews, OfAPackedBatch) {
  const flash::OperandViews x = flash::operand_views(packed());
  expect_view(x.q, 0x1000, {64, 4, 200, 1}, {1, 64, 256, 0});
  expect_view(x.k, 0x2000, {64, 2, 400, 1}, {1, 64, 128, 0});
  expect_view(x.v, 0x3000, {32, 2, 400, 1}, {1, 32, 64, 0});
  expect_view(x.o, 0x4000, {32, 4, 200, 1}, {1, 32, 128, 0});
  EXPECT_TRUE(can_map(x));
}

TEST(OperandViews, OfPagesAndCaches) {
  static const int32_t pages[1] = {};  // not read
  flash::Flash_fwd_params p = packed();
  p.block_table = pages;
  p.page_size = 16, p.k_entries = 25;
  p.k = operand(0x2000, 16, 2, 64);
  p.v = operand(0x3000, 16, 2, 32);
  const flash::OperandViews paged = flash::operand_views(p);
  expect_view(paged.q, 0x1000, {64, 4, 200, 1}, {1, 64, 256, 0});
  expect_view(paged.k, 0x2000, {64, 2, 16, 25}, {1, 64, 128, 2048});
  expect_view(paged.v, 0x3000, {32, 2, 16, 25}, {1, 32, 64, 1024});

  flash::Flash_fwd_params cache = dense();
  cache.k_entries = 7;  // more than the batch
  expect_view(flash::operand_views(cache).k, 0x2000, {64, 2, 200, 7}, {1, 64, 128, 25600});
}

TEST(OperandViews, AllFourMustBeMappable) {
  for (flash::Operand flash::Operands::* x :
       {&flash::Operands::q, &flash::Operands::k, &flash::Operands::v, &flash::Operands::o}) {
    flash::Flash_fwd_params p = dense();
    (p.*x).row_stride += 4;
    EXPECT_FALSE(can_map(flash::operand_views(p)));
    p = dense();
    (p.*x).head_stride = 0;
    EXPECT_FALSE(can_map(flash::operand_views(p)));
    p = packed();
    (p.*x).ptr = static_cast<char*>((p.*x).ptr) + 2;
    EXPECT_FALSE(can_map(flash::operand_views(p)));
  }
  flash::Flash_fwd_params empty = dense();
  empty.seqlen_k = 0;
  EXPECT_FALSE(can_map(flash::operand_views(empty)));
}

}  // namespace
}  // namespace flash_test
