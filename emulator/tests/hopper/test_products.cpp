// Panels and tile products of every instruction set of this machine against host sums.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "exec/isa.h"
#include "exec/number_formats.h"

namespace gpu_emulator::exec {
namespace {

int element_bytes(MatrixType type) {
  return type == MatrixType::kTf32                               ? 4
         : type == MatrixType::kF16 || type == MatrixType::kBf16 ? 2
                                                                 : 1;
}

bool is_integer(MatrixType type) { return type == MatrixType::kS8 || type == MatrixType::kU8; }

double value_of(MatrixType type, uint32_t bits) {
  switch (type) {
    case MatrixType::kF16:
      return f16_to_float(bits);
    case MatrixType::kBf16:
      return bf16_to_float(bits);
    case MatrixType::kTf32: {
      bits &= 0xffffe000u;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    case MatrixType::kE4m3:
      return e4m3_to_float(bits);
    case MatrixType::kE5m2:
      return e5m2_to_float(bits);
    case MatrixType::kS8:
      return static_cast<int8_t>(bits);
    default:
      return static_cast<uint8_t>(bits);
  }
}

struct Matrix {  // [rows][k], as bytes of chunks, K-major or MN-major
  MatrixType type;
  int rows, k;
  bool mn_major;
  std::vector<uint32_t> bits;
  std::vector<std::byte> storage;
  std::vector<const std::byte*> chunks;

  Matrix(MatrixType type, int rows, bool mn_major, std::mt19937& random)
      : type(type), rows(rows), k(32 / element_bytes(type)), mn_major(mn_major) {
    const int size = element_bytes(type);
    bits.resize(static_cast<size_t>(rows) * k);
    for (uint32_t& x : bits) x = random_bits(random);
    storage.resize(bits.size() * size);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < k; ++c) {
        const int index = mn_major ? c * rows + r : r * k + c;
        std::memcpy(storage.data() + index * size, &bits[r * k + c], size);
      }
    }
    for (size_t i = 0; i < storage.size(); i += 16) chunks.push_back(storage.data() + i);
  }

  // Small values, so that sums are exact.
  uint32_t random_bits(std::mt19937& random) const {
    const int small = std::uniform_int_distribution<int>(-4, 4)(random);
    const auto x = static_cast<float>(small);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    switch (type) {
      case MatrixType::kTf32:
        return bits | 0x1fff;  // ignored
      case MatrixType::kBf16:
        return bits >> 16;
      case MatrixType::kF16:
        return to_small(x, kF16Format, {});
      case MatrixType::kE4m3:
        return to_small(x, kE4m3Format, {});
      case MatrixType::kE5m2:
        return to_small(x, kE5m2Format, {});
      default:
        return random() & 0xff;
    }
  }

  double at(int r, int c) const { return value_of(type, bits[r * k + c]); }
};

struct Case {
  MatrixType a, b;
  AccumulatorType d;
  bool mn_major;
};

struct alignas(64) Register {
  uint32_t lane[32];
};

void check_product(const Isa& isa, const Case& c, int n, bool accumulate, bool negate) {
  std::mt19937 random(static_cast<unsigned>(n) * 7 + static_cast<unsigned>(c.a));
  const Matrix a(c.a, 16, c.mn_major, random), b(c.b, n, c.mn_major, random);
  alignas(64) static uint32_t a_panel[32 * 64], b_panel[32 * 256];
  isa.pack_a(c.a)(a.chunks.data(), {c.mn_major, negate, 16}, a_panel);
  isa.pack_b(c.b)(b.chunks.data(), {c.mn_major, false, n}, b_panel);
  const bool half = c.d == AccumulatorType::kF16;
  std::vector<Register> registers(half ? n / 4 : n / 2);
  std::vector<uint32_t*> d;
  for (Register& r : registers) d.push_back(r.lane);
  const double start = accumulate ? 3 : 0;
  for (uint32_t* r : d) {
    const float three = 3;
    for (int lane = 0; lane < 32; ++lane) {
      r[lane] = half ? 0x42004200u : is_integer(c.a) ? 3u : 0u;
      if (!half && !is_integer(c.a)) std::memcpy(&r[lane], &three, 4);
    }
  }
  isa.tile_product(c.d)(d.data(), {a_panel, b_panel, n, a.k}, accumulate);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < n; ++col) {
      double sum = start;
      for (int k = 0; k < a.k; ++k) sum += (negate ? -1 : 1) * a.at(row, k) * b.at(col, k);
      const int lane = row % 8 * 4 + col % 8 / 2;
      double got;
      if (half) {
        const uint32_t packed = d[col / 8 * 2 + row / 8][lane];
        got = f16_to_float(packed >> (col % 2 * 16) & 0xffff);
      } else {
        const uint32_t bits = d[col / 8 * 4 + row / 8 * 2 + col % 2][lane];
        float value;
        std::memcpy(&value, &bits, 4);
        got = is_integer(c.a) ? static_cast<int32_t>(bits) : value;
      }
      ASSERT_EQ(got, sum) << isa.name << " row " << row << " column " << col << " n " << n;
    }
  }
}

TEST(TileProduct, EveryTypeAndShape) {
  using T = MatrixType;
  using D = AccumulatorType;
  const Case cases[] = {
      {T::kF16, T::kF16, D::kF32, false},   {T::kF16, T::kF16, D::kF32, true},
      {T::kF16, T::kF16, D::kF16, false},   {T::kBf16, T::kBf16, D::kF32, false},
      {T::kBf16, T::kBf16, D::kF32, true},  {T::kTf32, T::kTf32, D::kF32, false},
      {T::kE4m3, T::kE4m3, D::kF32, false}, {T::kE5m2, T::kE4m3, D::kF32, false},
      {T::kE4m3, T::kE5m2, D::kF16, false}, {T::kS8, T::kS8, D::kS32, false},
      {T::kU8, T::kS8, D::kS32, false},     {T::kU8, T::kU8, D::kS32Saturated, false},
  };
  for (const Isa* isa : available_isas()) {
    for (const Case& c : cases) {
      for (int n : {8, 16, 72, 128, 256}) {
        check_product(*isa, c, n, true, false);
        check_product(*isa, c, n, false, false);
        if (!is_integer(c.a)) check_product(*isa, c, n, true, true);
      }
    }
  }
}

TEST(TileProduct, Saturates) {
  alignas(64) static int32_t a_panel[32 * 64], b_panel[32 * 8];
  std::fill(std::begin(a_panel), std::end(a_panel), 127);
  std::fill(std::begin(b_panel), std::end(b_panel), 127);
  for (const Isa* isa : available_isas()) {
    for (AccumulatorType type : {AccumulatorType::kS32, AccumulatorType::kS32Saturated}) {
      alignas(64) uint32_t d[4][32];
      uint32_t* registers[4];
      for (int i = 0; i < 4; ++i) {
        std::fill(std::begin(d[i]), std::end(d[i]), 0x7ffffff0u);
        registers[i] = d[i];
      }
      isa->tile_product(type)(registers, {a_panel, b_panel, 8, 32}, true);
      const uint32_t wrapped = 0x7ffffff0u + 32 * 127 * 127;
      EXPECT_EQ(d[2][17], type == AccumulatorType::kS32 ? wrapped : 0x7fffffffu);
    }
  }
}

}  // namespace
}  // namespace gpu_emulator::exec
