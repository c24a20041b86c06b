// Swizzles, tensor boxes, matrix descriptors, mbarrier objects, reductions: as functions.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "device/tensor_map.h"
#include "exec/bulk_copy.h"
#include "exec/mbarrier.h"
#include "exec/number_formats.h"
#include "exec/reduction.h"
#include "exec/swizzle.h"
#include "exec/wgmma_operand.h"

namespace gpu_emulator::exec {
namespace {

// CuTe writes the layouts as Swizzle<B, 4, 3>: bits [4, 4 + B) ^= bits [7, 7 + B).
uint32_t cute_swizzle(uint32_t address, int bits) {
  const uint32_t mask = ((1u << bits) - 1) << 7;
  return address ^ (address & mask) >> 3;
}

TEST(Swizzle, IsCuTes) {
  for (uint32_t address = 0; address < 4096; ++address) {
    EXPECT_EQ(swizzled(address, 0), address);
    EXPECT_EQ(swizzled(address, 32), cute_swizzle(address, 1));
    EXPECT_EQ(swizzled(address, 64), cute_swizzle(address, 2));
    EXPECT_EQ(swizzled(address, 128), cute_swizzle(address, 3));
  }
}

TEST(Swizzle, BaseOffsetMovesThePattern) {
  // A pattern that begins at line 3 looks as one that begins at line 0.
  for (uint32_t offset = 0; offset < 1024; offset += 16) {
    EXPECT_EQ(swizzled(3 * 128 + offset, 128, 3) - 3 * 128, swizzled(offset, 128));
  }
}

TEST(MatrixDescriptor, Fields) {
  const uint64_t bits =
      uint64_t{2} << 62 | uint64_t{5} << 49 | uint64_t{0x40} << 32 | uint64_t{0x3fff} << 16 | 0x123;
  const MatrixDescriptor matrix = matrix_descriptor(bits);
  EXPECT_EQ(matrix.start, 0x1230u);
  EXPECT_EQ(matrix.leading_offset, 0x3fff0u);
  EXPECT_EQ(matrix.stride_offset, 0x400u);
  EXPECT_EQ(matrix.base_offset, 5u);
  EXPECT_EQ(matrix.swizzle, 64u);
  EXPECT_EQ(matrix_descriptor(uint64_t{1} << 62).swizzle, 128u);
  EXPECT_EQ(matrix_descriptor(uint64_t{3} << 62).swizzle, 32u);
  EXPECT_EQ(matrix_descriptor(0).swizzle, 0u);
}

TEST(MatrixDescriptor, ChunksOfADenseMatrixAreAllOfIt) {
  for (uint32_t swizzle : {0u, 32u, 64u, 128u}) {
    for (bool mn_major : {false, true}) {
      MatrixDescriptor matrix;
      matrix.swizzle = swizzle;
      const uint32_t width = swizzle ? swizzle : 16;
      if (mn_major) {  // 64 rows x 16 k: groups of `width` bytes of rows, 8 k each
        matrix.leading_offset = swizzle ? 16 * width : 1024;
        matrix.stride_offset = swizzle ? 8 * width : 128;
      } else {  // 64 rows of 32 bytes within a pitch of `width`
        matrix.leading_offset = 1024;
        matrix.stride_offset = swizzle ? 8 * width : 128;
      }
      uint32_t address[kMaxChunks];
      const int count = operand_chunks(matrix, mn_major, 0, 64, address);
      EXPECT_EQ(count, 128);
      const std::set<uint32_t> distinct(address, address + count);
      EXPECT_EQ(distinct.size(), 128u) << swizzle << mn_major;
    }
  }
}

TensorMap random_map(std::mt19937& random) {
  auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  TensorMap map;
  map.rank = static_cast<uint8_t>(pick(1, 5));
  map.element = TensorElement::kF16;
  uint64_t stride = 16 * 8;
  for (int i = 0; i < map.rank; ++i) {
    map.dims[i] = static_cast<uint64_t>(pick(1, i == 0 ? 60 : 6));
    map.box[i] = static_cast<uint16_t>(i == 0 ? 8 * pick(1, 4) : pick(1, 5));
    map.element_strides[i] = static_cast<uint8_t>(i == 0 ? 1 : pick(1, 3));
    if (i) {
      map.strides[i - 1] = stride;
      stride *= map.dims[i];
    }
  }
  return map;
}

// Every element of the box by the definition: box position -> tensor position -> inside or not.
TEST(TensorBox, SegmentsAreTheElementsInside) {
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    const TensorMap map = random_map(random);
    ASSERT_EQ(tensor_map_error(map), "");
    int32_t coordinates[kMaxTensorRank] = {};
    uint32_t count[kMaxTensorRank], elements = 1;
    for (int i = 0; i < kMaxTensorRank; ++i) {
      coordinates[i] = std::uniform_int_distribution<int>(-9, 9)(random);
      count[i] = i < map.rank ? box_elements(map, i) : 1;
      elements *= count[i];
    }
    std::vector<uint64_t> expected(elements, ~uint64_t{0}), found = expected;
    for (uint32_t e = 0; e < elements; ++e) {
      uint32_t rest = e;
      uint64_t address = 0;
      bool inside = true;
      for (int i = 0; i < map.rank; ++i) {
        const int64_t at = coordinates[i] + int64_t{rest % count[i]} * map.element_strides[i];
        rest /= count[i];
        inside &= at >= 0 && at < static_cast<int64_t>(map.dims[i]);
        address += static_cast<uint64_t>(at) * (i == 0 ? 2 : map.strides[i - 1]);
      }
      if (inside) expected[e] = address;
    }
    for (const Segment& segment : box_segments(map, coordinates)) {
      for (uint32_t b = 0; b < segment.bytes; b += 2) {
        found.at((segment.linear + b) / 2) = segment.global + b;
      }
    }
    EXPECT_EQ(found, expected) << round;
    EXPECT_EQ(box_bytes(map), elements * 2);
  }
}

TEST(TensorBox, SwizzledImageIsAPermutation) {
  std::vector<std::byte> box(4096), image(4096), back(4096);
  for (size_t i = 0; i < box.size(); ++i) box[i] = static_cast<std::byte>(i * 37 >> 3);
  for (uint32_t width : {0u, 32u, 64u, 128u}) {
    to_swizzled(box.data(), 4096, 1024, width, image.data());
    from_swizzled(back.data(), 4096, 1024, width, image.data());
    EXPECT_EQ(back, box);
    for (uint32_t i = 0; i < 4096; ++i) {
      EXPECT_EQ(image[swizzled(1024 + i, width) - 1024], box[i]);
    }
  }
}

TEST(TensorMap, RulesAreNamed) {
  TensorMap map;
  map.rank = 2;
  map.element = TensorElement::kBf16;
  map.dims[0] = map.dims[1] = 64;
  map.box[0] = map.box[1] = 64;
  map.strides[0] = 128;
  map.swizzle = TensorSwizzle::k128B;
  EXPECT_EQ(tensor_map_error(map), "");
  TensorMap bad = map;
  bad.box[0] = 128;  // 256 bytes in a swizzle of 128
  EXPECT_NE(tensor_map_error(bad).find("swizzle"), std::string::npos);
  bad = map;
  bad.strides[0] = 130;
  EXPECT_NE(tensor_map_error(bad).find("globalStrides[0]"), std::string::npos);
  bad = map;
  bad.base = 8;
  EXPECT_NE(tensor_map_error(bad).find("globalAddress"), std::string::npos);
  bad = map;
  bad.box[1] = 257;
  EXPECT_NE(tensor_map_error(bad).find("boxDim[1]"), std::string::npos);
  bad = map;
  bad.magic = 0;
  EXPECT_NE(tensor_map_error(bad), "");
}

TEST(Mbarrier, PhaseEndsWhenArrivalsAndBytesAreIn) {
  Mbarrier barrier(2);
  EXPECT_EQ(barrier.complete(64), nullptr);  // ahead of expect_tx
  EXPECT_EQ(barrier.transfer(), -64);
  EXPECT_EQ(barrier.expect(128), nullptr);
  EXPECT_EQ(barrier.arrive(1), nullptr);
  EXPECT_EQ(barrier.arrive(1), nullptr);
  EXPECT_FALSE(barrier.end_phase());
  EXPECT_NE(barrier.arrive(1), nullptr);  // one too many
  EXPECT_EQ(barrier.complete(64), nullptr);
  EXPECT_TRUE(barrier.end_phase());
  EXPECT_EQ(barrier.phase(), 1u);
  EXPECT_EQ(barrier.pending(), 2u);
}

TEST(Mbarrier, DropLowersTheNextPhases) {
  Mbarrier barrier(3);
  EXPECT_EQ(barrier.drop(1), nullptr);
  EXPECT_EQ(barrier.arrive(1), nullptr);
  EXPECT_EQ(barrier.arrive(2), nullptr);
  EXPECT_TRUE(barrier.end_phase());
  EXPECT_EQ(barrier.pending(), 2u);
  EXPECT_NE(barrier.drop(3), nullptr);
}

TEST(Mbarrier, Limits) {
  Mbarrier barrier(1);
  EXPECT_NE(barrier.arrive(0), nullptr);
  EXPECT_NE(barrier.arrive_no_complete(1), nullptr);
  EXPECT_NE(barrier.expect(Mbarrier::kMaxCount + 1), nullptr);
  Mbarrier second(1);
  EXPECT_EQ(second.complete(Mbarrier::kMaxCount), nullptr);
  EXPECT_NE(second.complete(1), nullptr);
  EXPECT_EQ(Mbarrier::pending_of(second.state()), 1u);
  EXPECT_EQ(Mbarrier::phase_of(second.state()), 0u);
}

template <class T>
void expect_reduction(ReductionOp op, ptx::Type type, std::vector<T> memory, std::vector<T> values,
                      std::vector<T> expected) {
  reduce({op, type}, reinterpret_cast<std::byte*>(memory.data()),
         reinterpret_cast<const std::byte*>(values.data()), memory.size() * sizeof(T));
  EXPECT_EQ(memory, expected);
}

TEST(Reduction, EachOperation) {
  using Op = ReductionOp;
  using ptx::Type;
  expect_reduction<uint32_t>(Op::kAdd, Type::kU32, {1, ~0u}, {2, 3}, {3, 2});
  expect_reduction<int32_t>(Op::kMin, Type::kS32, {1, -5}, {-2, 3}, {-2, -5});
  expect_reduction<uint32_t>(Op::kMax, Type::kU32, {1, ~0u}, {2, 3}, {2, ~0u});
  expect_reduction<uint32_t>(Op::kInc, Type::kU32, {1, 7}, {7, 7}, {2, 0});
  expect_reduction<uint32_t>(Op::kDec, Type::kU32, {0, 7, 9}, {7, 7, 8}, {7, 6, 8});
  expect_reduction<uint64_t>(Op::kXor, Type::kB64, {0xff00}, {0x0ff0}, {0xf0f0});
  expect_reduction<uint32_t>(Op::kAnd, Type::kB32, {6}, {3}, {2});
  expect_reduction<uint32_t>(Op::kOr, Type::kB32, {6}, {3}, {7});
  expect_reduction<float>(Op::kAdd, Type::kF32, {1.5f}, {2.25f}, {3.75f});
  expect_reduction<double>(Op::kAdd, Type::kF64, {1.5}, {2.25}, {3.75});
  // fp16: 2048 + 1 rounds to even; bf16: 256 + 1 as well.
  expect_reduction<uint16_t>(Op::kAdd, Type::kF16, {0x6800}, {0x3c00}, {0x6800});
  expect_reduction<uint16_t>(Op::kAdd, Type::kBf16, {0x4380}, {0x3f80}, {0x4380});
  expect_reduction<uint16_t>(Op::kMin, Type::kF16, {0x3c00}, {0xbc00}, {0xbc00});
  expect_reduction<uint16_t>(Op::kMax, Type::kBf16, {0x3f80}, {0xbf80}, {0x3f80});
}

}  // namespace
}  // namespace gpu_emulator::exec
