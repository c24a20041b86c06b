// What the sm80 kernels take for granted, checked without a GPU: who holds which element, which
// addresses conflict, in which order slots and tiles go round, which blocks are visited.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <iterator>
#include <set>
#include <utility>
#include <vector>

#include "base/fast_divide.h"
#include "base/ptx/fragments.h"
#include "common/block_range.h"
#include "common/softmax.h"
#include "common/tile_scheduler.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "sm80/kernel_list.h"
#endif
#include "sm80/decode_smem.h"
#include "sm80/pipeline.h"
#include "sm80/smem.h"
#include "sm80/tile_table.h"
#include "warp/smem_tile.h"

namespace flash_test {
namespace {

using flash::ptx::Chunk;
using flash::ptx::Element;
using Place = std::pair<int, int>;

// The maps as values: they are always inlined, so their addresses cannot be taken.
constexpr auto kA = [](int lane, int i, int h) { return flash::ptx::a_element(lane, i, h); };
constexpr auto kB = [](int lane, int i, int h) { return flash::ptx::b_element(lane, i, h); };
constexpr auto kAChunk = [](int lane) { return flash::ptx::a_chunk(lane); };
constexpr auto kKChunk = [](int lane) { return flash::ptx::b_chunk_n_major(lane); };
constexpr auto kVChunk = [](int lane) { return flash::ptx::b_chunk_k_major(lane); };

// Every element of a rows x cols matrix is held once.
template <typename Map>
void expect_partition(int rows, int cols, int registers, int halves, const Map& map) {
  std::set<Place> seen;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < registers; ++i) {
      for (int h = 0; h < halves; ++h) {
        const Element e = map(lane, i, h);
        EXPECT_TRUE(0 <= e.row && e.row < rows && 0 <= e.col && e.col < cols);
        EXPECT_TRUE(seen.emplace(e.row, e.col).second) << "twice: " << e.row << ", " << e.col;
      }
    }
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(rows * cols));
}

TEST(Fragments, HoldEveryElementOnce) {
  expect_partition(16, 8, 4, 1,
                   [](int lane, int i, int) { return flash::ptx::accumulator_element(lane, i); });
  expect_partition(16, 16, 4, 2, kA);
  expect_partition(16, 8, 2, 2, kB);
}

// The examples of the PTX ISA's figures for mma.m16n8k16.
TEST(Fragments, FollowThePtxIsa) {
  const auto is = [](Element e, int row, int col) { return e.row == row && e.col == col; };
  EXPECT_TRUE(is(flash::ptx::accumulator_element(0, 1), 0, 1));
  EXPECT_TRUE(is(flash::ptx::accumulator_element(31, 3), 15, 7));
  EXPECT_TRUE(is(flash::ptx::accumulator_element(4, 2), 9, 0));
  EXPECT_TRUE(is(flash::ptx::a_element(0, 1, 0), 8, 0));
  EXPECT_TRUE(is(flash::ptx::a_element(0, 2, 1), 0, 9));
  EXPECT_TRUE(is(flash::ptx::a_element(31, 3, 1), 15, 15));
  EXPECT_TRUE(is(flash::ptx::b_element(5, 0, 1), 3, 1));
  EXPECT_TRUE(is(flash::ptx::b_element(31, 1, 1), 15, 7));
}

// Two neighbouring n8 accumulators are operand A of 16 keys, register by register.
TEST(Fragments, AccumulatorsAreOperandA) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        const Element a = flash::ptx::a_element(lane, i, h);
        const Element s = flash::ptx::accumulator_element(lane, 2 * (i % 2) + h);
        EXPECT_EQ(a.row, s.row);
        EXPECT_EQ(a.col, s.col + 8 * (i / 2));
      }
    }
  }
}

// What ldmatrix.x4 leaves in half h of register i of `lane`, as (row, column) of shared memory.
template <typename ChunkOf>
Element ldmatrix_x4(int lane, int i, int h, bool transposed, const ChunkOf& chunk_of) {
  const int row = transposed ? 2 * (lane % 4) + h : lane / 4;
  const int col = transposed ? lane / 4 : 2 * (lane % 4) + h;
  const Chunk address = chunk_of(8 * i + row);
  return {address.row, address.chunk * 8 + col};
}

TEST(Fragments, LdmatrixFetchesTheOperands) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        const Element a = ldmatrix_x4(lane, i, h, false, kAChunk);
        const Element wanted_a = flash::ptx::a_element(lane, i, h);
        EXPECT_TRUE(a.row == wanted_a.row && a.col == wanted_a.col);
        Element wanted_b = flash::ptx::b_element(lane, i % 2, h);
        wanted_b.col += 8 * (i / 2);
        const Element k = ldmatrix_x4(lane, i, h, false, kKChunk);
        EXPECT_TRUE(k.row == wanted_b.col && k.col == wanted_b.row);
        const Element v = ldmatrix_x4(lane, i, h, true, kVChunk);
        EXPECT_TRUE(v.row == wanted_b.row && v.col == wanted_b.col);
      }
    }
  }
}

// Eight accesses of 16 bytes touch all 32 banks.
void expect_no_conflict(const std::array<int, 8>& offsets) {
  std::set<int> groups;
  for (int offset : offsets) groups.insert(offset / 16 % 8);
  EXPECT_EQ(groups.size(), 8u);
}

template <int kHeadDim>
void check_swizzle() {
  using Smem = flash::SmemTile<kHeadDim, 32>;
  for (Chunk (*chunk_of)(int) : {+kAChunk, +kKChunk}) {
    for (int column = 0; column < kHeadDim / 16; ++column) {
      for (int block = 0; block < 4; ++block) {
        std::array<int, 8> offsets;
        for (int i = 0; i < 8; ++i) {
          const Chunk c = chunk_of(8 * block + i);
          offsets[i] = (Smem::offset(c.row, c.chunk) ^ Smem::flip(column)) + Smem::ahead(column);
          EXPECT_EQ(offsets[i], Smem::offset(c.row, c.chunk + 2 * column));
        }
        expect_no_conflict(offsets);
      }
    }
  }
  // Copies of a group, eight threads at a time, which have a row or two.
  for (int first = 0; first < 16 * Smem::kChunks; first += 8) {
    std::array<int, 8> offsets;
    for (int i = 0; i < 8; ++i)
      offsets[i] = Smem::offset((first + i) / Smem::kChunks, (first + i) % Smem::kChunks);
    expect_no_conflict(offsets);
  }
}

template <int kHeadDim>
void check_partition() {
  using Smem = flash::SmemTile<kHeadDim, 32>;
  std::set<int> seen;
  for (int row = 0; row < 32; ++row)
    for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) seen.insert(Smem::offset(row, chunk));
  EXPECT_EQ(seen.size(), static_cast<size_t>(32 * kHeadDim / 8));
  EXPECT_EQ(*seen.rbegin(), Smem::kBytes - 16);
}

TEST(Smem, OperandsConflictNowhere) {
  check_swizzle<32>();
  check_swizzle<64>();
  check_swizzle<96>();
  check_swizzle<128>();
  check_swizzle<192>();
  check_swizzle<256>();
}

TEST(Smem, EveryChunkHasItsPlace) {
  check_partition<32>();
  check_partition<96>();
  check_partition<128>();
  check_partition<192>();
}

TEST(FastDivide, IsDivision) {
  for (int divisor : {1, 2, 3, 5, 7, 16, 17, 64, 100, 255, 256, 257, 1 << 20, (1 << 20) + 1,
                      (1 << 30) - 1, 1 << 30, INT_MAX - 1, INT_MAX}) {
    const flash::FastDivide by = flash::FastDivide::by(divisor);
    for (int64_t n : {0, 1, 2, 15, 16, 17, 12345, 1 << 24, (1 << 30) + 1, INT_MAX - 1, INT_MAX})
      EXPECT_EQ(by.quotient(static_cast<int>(n)), n / divisor) << n << " / " << divisor;
    for (int64_t q : {int64_t{1}, int64_t{2}, int64_t{INT_MAX} / divisor}) {
      for (int64_t n : {q * divisor - 1, q * divisor, q * divisor + 1}) {
        if (0 <= n && n <= INT_MAX) {
          EXPECT_EQ(by.quotient(static_cast<int>(n)), n / divisor) << n << " / " << divisor;
        }
      }
    }
  }
}

TEST(Pipeline, TheFreedSlotIsTheOneReadBefore) {
  flash::sm80::PipeState<3> pipe;
  int before = 2;
  std::array<int, 3> visits{};
  for (int step = 0; step < 30; ++step) {
    EXPECT_EQ(pipe.freed(), before);
    before = pipe.slot;
    ++visits[pipe.slot];
    pipe.advance();
  }
  EXPECT_EQ(visits, (std::array<int, 3>{10, 10, 10}));
}

TEST(TileTable, HasABucketForEveryHeadDimAndClass) {
  using flash::ScoreClass;
  for (auto scores : {ScoreClass::kUnmasked, ScoreClass::kMasked, ScoreClass::kModified}) {
    for (int d = 1; d <= 256; ++d) {
      for (int d_v : {1, 32, 33, 64, 65, 96, 128, 129, 192, 193, 256}) {
        const flash::sm80::Tile& tile = flash::sm80::tile_of(d, d_v, scores);
        ASSERT_LT(&tile, std::end(flash::sm80::kTiles));
        EXPECT_TRUE(flash::sm80::has(tile, d, d_v, scores));
      }
    }
  }
}

TEST(DecodeTable, HasTheSmallestBucketForAllHeadDims) {
  const auto dims = [](int d, int d_v) {
    const flash::sm80::DecodeTile& tile = flash::sm80::decode_tile_of(d, d_v);
    return Place{tile.head_dim, tile.head_dim_v};
  };
  EXPECT_EQ(dims(1, 64), (Place{64, 64}));
  EXPECT_EQ(dims(64, 65), (Place{128, 128}));
  EXPECT_EQ(dims(192, 128), (Place{256, 256}));
  EXPECT_EQ(dims(257, 1), (Place{576, 512}));
  EXPECT_EQ(dims(1, 257), (Place{576, 512}));
  EXPECT_EQ(dims(flash::sm80::kMaxHeadDim, flash::sm80::kMaxHeadDimV), (Place{576, 512}));
}

TEST(TileTable, TakesTheSmallestBucket) {
  using flash::ScoreClass;
  const auto dims = [](int d, int d_v) {
    const flash::sm80::Tile& tile = flash::sm80::tile_of(d, d_v, ScoreClass::kMasked);
    return Place{tile.head_dim, tile.head_dim_v};
  };
  EXPECT_EQ(dims(1, 32), (Place{32, 32}));
  EXPECT_EQ(dims(33, 8), (Place{64, 64}));
  EXPECT_EQ(dims(80, 80), (Place{96, 96}));
  EXPECT_EQ(dims(192, 128), (Place{192, 128}));
  EXPECT_EQ(dims(128, 192), (Place{192, 192}));
  EXPECT_EQ(dims(193, 16), (Place{256, 256}));
  EXPECT_EQ(flash::sm80::tile_of(64, 64, ScoreClass::kUnmasked).n, 128);
}

#if defined(FLASH_ATTN_HAVE_CUDA)
// generate_kernels.py lists what the tables have, and no more.
TEST(TileTable, HasAKernelForEveryTile) {
  const auto count = [](const auto& kernels, const auto& config) {
    return std::ranges::count(kernels, config, [](const auto& kernel) { return kernel.config; });
  };
  for (const flash::Dtype dtype : {flash::Dtype::kFloat16, flash::Dtype::kBFloat16}) {
    for (const flash::sm80::Tile& t : flash::sm80::kTiles) {
      const flash::sm80::FwdConfig config{dtype, t.head_dim, t.head_dim_v, t.scores};
      EXPECT_EQ(count(flash::sm80::kFwdKernels, config), 1) << t.head_dim << "x" << t.head_dim_v;
    }
    for (const flash::sm80::DecodeTile& t : flash::sm80::kDecodeTiles) {
      const flash::sm80::DecodeConfig config{dtype, t.head_dim, t.head_dim_v};
      EXPECT_EQ(count(flash::sm80::kDecodeKernels, config), 1) << t.head_dim;
    }
  }
  EXPECT_EQ(flash::sm80::kFwdKernels.size(), 2 * std::size(flash::sm80::kTiles));
  EXPECT_EQ(flash::sm80::kDecodeKernels.size(), 2 * std::size(flash::sm80::kDecodeTiles));
}
#endif

// Shared memory that a CTA may have: 163 KiB on compute capability 8.0, 99 on 8.6, 8.9 and 12.0.
template <flash::Dtype kDtype, size_t... kI>
void expect_to_fit(std::index_sequence<kI...>) {
  using flash::sm80::kTiles;
  const size_t bytes[] = {
      sizeof(flash::sm80::SmemPlan<flash::sm80::FwdConfig{
                 kDtype, kTiles[kI].head_dim, kTiles[kI].head_dim_v, kTiles[kI].scores}>)...};
  for (size_t i = 0; i < std::size(kTiles); ++i) {
    EXPECT_LE(bytes[i], size_t{99} << 10) << kTiles[i].head_dim;
    EXPECT_LE(kTiles[i].ctas_per_sm * (bytes[i] + 1024), size_t{164} << 10) << kTiles[i].head_dim;
  }
}

template <flash::Dtype kDtype, size_t... kI>
void expect_decode_to_fit(std::index_sequence<kI...>) {
  using flash::sm80::kDecodeTiles;
  const size_t bytes[] = {flash::sm80::SmemPlan<flash::sm80::DecodeConfig{
      kDtype, kDecodeTiles[kI].head_dim, kDecodeTiles[kI].head_dim_v}>::bytes()...};
  for (size_t i = 0; i < std::size(kDecodeTiles); ++i)
    EXPECT_LE(bytes[i], size_t{99} << 10) << kDecodeTiles[i].head_dim;
}

TEST(DecodeTable, FitsIntoEveryDevice) {
  expect_decode_to_fit<flash::Dtype::kBFloat16>(
      std::make_index_sequence<std::size(flash::sm80::kDecodeTiles)>());
}

TEST(TileTable, FitsIntoEveryDevice) {
  expect_to_fit<flash::Dtype::kBFloat16>(
      std::make_index_sequence<std::size(flash::sm80::kTiles)>());
}

// How many of the scores of queries first..last and keys of a block are visible, by the predicate
// of flash_attn.h.
int visible_scores(const flash::Mask& m, int first, int last, int block, int size) {
  int visible = 0;
  for (int i = first; i <= std::min(last, m.seqlen_q - 1); ++i) {
    for (int j = block * size; j < std::min(m.seqlen_k, (block + 1) * size); ++j) {
      const int64_t diagonal = int64_t{i} + m.seqlen_k - m.seqlen_q;
      visible += (m.left < 0 || j >= diagonal - m.left) && (m.right < 0 || j <= diagonal + m.right);
    }
  }
  return visible;
}

void check_block_range(const flash::Mask& m, int first, int last) {
  const int size = 4;
  const flash::BlockRange range = flash::block_range(m, first, last, size);
  const int queries = std::min(last, m.seqlen_q - 1) - first + 1;
  for (int block = 0; block * size < m.seqlen_k; ++block) {
    const int visible = visible_scores(m, first, last, block, size);
    const bool full = queries > 0 && visible == queries * size;
    EXPECT_EQ(range.contains(block) && range.is_full(block), full);
    // Nothing but a gap between two queries' keys is visited in vain, and queries are neighbours.
    EXPECT_EQ(range.contains(block), visible > 0)
        << "sq " << m.seqlen_q << " sk " << m.seqlen_k << " left " << m.left << " right " << m.right
        << " queries " << first << ".." << last << " block " << block;
  }
}

TEST(BlockRange, HoldsTheVisibleBlocksAndNoOthers) {
  for (int sq : {1, 5, 9}) {
    for (int sk : {0, 1, 6, 12, 17}) {
      for (int left : {-1, 0, 3, 9}) {
        for (int right : {-1, 0, 2, 8}) {
          for (int first = 0; first < 12; first += 3)
            check_block_range({sq, sk, left, right}, first, first + 2);
        }
      }
    }
  }
}

TEST(TileScheduler, VisitsEveryTileOnceLongestFirst) {
  for (int section : {1, 3, 4, 7}) {
    const flash::Tile_scheduler scheduler{5, 7, section};
    std::set<Place> seen;
    int first_head = 0, last_m = 4;
    for (int number = 0; number < scheduler.tiles(); ++number) {
      const flash::Tile_coordinates tile = scheduler.tile(number);
      EXPECT_TRUE(seen.emplace(tile.m_block, tile.batch_head).second);
      const int head = tile.batch_head / section * section;
      EXPECT_GE(head, first_head);  // a section after the other
      EXPECT_TRUE(head > first_head || tile.m_block <= last_m);
      first_head = head;
      last_m = tile.m_block;
    }
    EXPECT_EQ(seen.size(), 35u);
  }
}

TEST(TileScheduler, SectionsFitIntoTheCache) {
  EXPECT_EQ(flash::section_of(32, 4, 1 << 20, 10 << 20), 32);  // 8 groups of 1 MiB
  EXPECT_EQ(flash::section_of(32, 4, 2 << 20, 10 << 20), 20);
  EXPECT_EQ(flash::section_of(32, 4, 64 << 20, 10 << 20), 4);  // at least a group
  EXPECT_EQ(flash::section_of(6, 1, 0, 10 << 20), 6);
}

TEST(RowState, EmptyRowsAreMarked) {
  flash::RowState row;
  EXPECT_EQ(row.anchor(), 0.f);
  EXPECT_EQ(row.inverse_sum(), 0.f);
  EXPECT_EQ(row.lse(1.f), INFINITY);
  row = {2.f, 4.f};
  EXPECT_EQ(row.anchor(), 2.f);
  EXPECT_EQ(row.inverse_sum(), 0.25f);
  EXPECT_FLOAT_EQ(row.lse(0.5f), 1.f + std::log(4.f));
}

}  // namespace
}  // namespace flash_test
