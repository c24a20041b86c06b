// Exchange between lanes, ldmatrix and products of matrices, against host code.

#include <bit>
#include <cmath>
#include <functional>
#include <random>

#include "exec/isa.h"
#include "exec/number_formats.h"
#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

using Lanes = std::vector<uint32_t>;  // 32 a register, register by register

// Runs `body` in one warp: registers %r10.. hold `inputs`, registers %r40.. are returned.
Lanes run_warp(const std::string& body, const Lanes& inputs, int results,
               const exec::Isa* isa = nullptr, int shared = 0) {
  std::string text =
      "mov.u32 %r1, %laneid;\nmul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd3, %rd0, %rd2;\n"
      "add.u64 %rd4, %rd1, %rd2;\n";
  const int registers = static_cast<int>(inputs.size()) / 32;
  for (int i = 0; i < registers; ++i) {
    text +=
        "ld.global.b32 %r" + std::to_string(10 + i) + ", [%rd3+" + std::to_string(128 * i) + "];\n";
  }
  text += body;
  for (int i = 0; i < results; ++i) {
    text +=
        "st.global.b32 [%rd4+" + std::to_string(128 * i) + "], %r" + std::to_string(40 + i) + ";\n";
  }
  KernelRunner runner(kernel(text, 2, shared), isa);
  Lanes in = inputs, out(32 * results);
  runner.add(in);
  runner.add(out);
  runner.launch.block = {32, 1, 1};
  EXPECT_EQ(runner.run().text, "");
  return out;
}

Lanes random_lanes(int registers, unsigned seed = 9) {
  std::mt19937 random(seed);
  Lanes lanes(32 * registers);
  for (auto& x : lanes) x = random();
  return lanes;
}

// The pseudocode of shfl in the PTX ISA.
uint32_t shuffled(const std::string& mode, const Lanes& a, int lane, int b, int c, bool* valid) {
  const int bval = b & 31, cval = c & 31, segmask = c >> 8 & 31;
  const int max_lane = (lane & segmask) | (cval & ~segmask), min_lane = lane & segmask;
  int j = 0;
  if (mode == "up") {
    j = lane - bval;
    *valid = j >= max_lane;
  } else if (mode == "down") {
    j = lane + bval;
    *valid = j <= max_lane;
  } else if (mode == "bfly") {
    j = lane ^ bval;
    *valid = j <= max_lane;
  } else {
    j = min_lane | (bval & ~segmask);
    *valid = j <= max_lane;
  }
  return a[*valid ? j : lane];
}

TEST(WarpOpcodes, Shuffles) {
  const Lanes in = random_lanes(1);
  for (const std::string mode : {"up", "down", "bfly", "idx"}) {
    for (int b : {0, 1, 3, 16, 31}) {
      for (int c : {0, 0x1f, 0x1c1f, 0x1807, 0x1800}) {
        const std::string operands = std::to_string(b) + ", " + std::to_string(c);
        const Lanes out = run_warp("shfl.sync." + mode + ".b32 %r40|%p0, %r10, " + operands +
                                       ", -1;\nselp.u32 %r41, 1, 0, %p0;\n",
                                   in, 2);
        for (int lane = 0; lane < 32; ++lane) {
          bool valid = false;
          const uint32_t want = shuffled(mode, in, lane, b, c, &valid);
          ASSERT_EQ(out[lane], want) << mode << " " << operands << " lane " << lane;
          ASSERT_EQ(out[32 + lane], valid) << mode << " " << operands << " lane " << lane;
        }
      }
    }
  }
}

TEST(WarpOpcodes, VotesMatchesReductions) {
  Lanes in(32);
  uint32_t odd = 0, sum = 0, all = ~0u, any = 0, parity = 0;
  for (int i = 0; i < 32; ++i) {
    in[i] = i % 5 * 7 - 9;
    odd |= (in[i] & 1) << i;
    sum += in[i];
    all &= in[i];
    any |= in[i];
    parity ^= in[i];
  }
  const Lanes out = run_warp(
      "and.b32 %r2, %r10, 1;\nsetp.ne.u32 %p0, %r2, 0;\nvote.sync.ballot.b32 %r40, %p0, -1;\n"
      "vote.sync.all.pred %p1, %p0, -1;\nselp.u32 %r41, 1, 0, %p1;\n"
      "vote.sync.any.pred %p1, !%p0, -1;\nselp.u32 %r42, 1, 0, %p1;\n"
      "match.any.sync.b32 %r43, %r10, -1;\nmatch.all.sync.b32 %r44|%p2, %r10, -1;\n"
      "redux.sync.add.s32 %r45, %r10, -1;\nredux.sync.min.s32 %r46, %r10, -1;\n"
      "redux.sync.max.u32 %r47, %r10, -1;\nredux.sync.and.b32 %r48, %r10, -1;\n"
      "redux.sync.or.b32 %r49, %r10, -1;\nredux.sync.xor.b32 %r50, %r10, -1;\n"
      "activemask.b32 %r51;\nelect.sync %r52|%p3, -1;\nselp.u32 %r53, 1, 0, %p3;\n",
      in, 14);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t same = 0;
    for (int j = 0; j < 32; ++j) same |= static_cast<uint32_t>(in[j] == in[lane]) << j;
    const uint32_t want[] = {odd,        0,   1,   same,   0,   sum, static_cast<uint32_t>(-9),
                             0xfffffffe, all, any, parity, ~0u, 0,   lane == 0};
    for (int k = 0; k < 14; ++k) ASSERT_EQ(out[32 * k + lane], want[k]) << k << " lane " << lane;
  }
}

TEST(WarpOpcodes, ShuffleAmongSomeLanes) {
  // Odd lanes exchange with their neighbours two away, in a branch of their own.
  const Lanes in = random_lanes(1);
  const Lanes out = run_warp(
      "mov.u32 %r40, 0;\nand.b32 %r2, %r1, 1;\nsetp.eq.u32 %p0, %r2, 0;\n@%p0 bra DONE;\n"
      "shfl.sync.bfly.b32 %r40, %r10, 2, 0x1f, 0xaaaaaaaa;\nDONE:\n",
      in, 1);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[i], i % 2 ? in[i ^ 2] : 0);
}

TEST(WarpOpcodes, Ldmatrix) {
  // 32 rows of 16 bytes in shared memory; lane l gives row l.
  const Lanes in = random_lanes(4);
  const std::string store =
      "shl.b32 %r2, %r1, 4;\nadd.u32 %r3, %r63, %r2;\n"
      "st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};\nbar.sync 0;\n";
  auto half = [&](int row, int column) {  // element of the 32 x 8 array
    return in[32 * (column / 2) + row] >> (16 * (column % 2)) & 0xffff;
  };
  for (const bool transposed : {false, true}) {
    for (int count : {1, 2, 4}) {
      std::string registers;
      for (int i = 0; i < count; ++i) registers += (i ? ", %r" : "%r") + std::to_string(40 + i);
      const Lanes out =
          run_warp(store + "ldmatrix.sync.aligned.m8n8.x" + std::to_string(count) +
                       (transposed ? ".trans" : "") + ".shared.b16 {" + registers + "}, [%r3];\n",
                   in, count, nullptr, 512);
      for (int m = 0; m < count; ++m) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int e = 0; e < 2; ++e) {
            const int row = transposed ? 2 * (lane % 4) + e : lane / 4;
            const int column = transposed ? lane / 4 : 2 * (lane % 4) + e;
            ASSERT_EQ(out[32 * m + lane] >> (16 * e) & 0xffff, half(8 * m + row, column));
          }
        }
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- mma

// A type of mma's operands: its name, bits, the value of its bits, and random bits of small values.
struct Element {
  const char* name;
  int bits;
  std::function<double(uint32_t)> value;
  bool is_integer = false;
};

const Element kF16 = {"f16", 16, [](uint32_t x) { return exec::f16_to_float(x); }};
const Element kBf16 = {"bf16", 16, [](uint32_t x) { return exec::bf16_to_float(x); }};
const Element kTf32 = {"tf32", 32, [](uint32_t x) { return std::bit_cast<float>(x & 0xffffe000); }};
const Element kE4m3 = {"e4m3", 8, [](uint32_t x) { return exec::e4m3_to_float(x); }};
const Element kE5m2 = {"e5m2", 8, [](uint32_t x) { return exec::e5m2_to_float(x); }};
const Element kS8 = {"s8", 8, [](uint32_t x) { return static_cast<int8_t>(x); }, true};
const Element kU8 = {"u8", 8, [](uint32_t x) { return static_cast<uint8_t>(x); }, true};

uint32_t random_element(const Element& type, std::mt19937& random) {
  for (;;) {
    const uint32_t bits = random() & (type.bits == 32 ? ~0u : (1u << type.bits) - 1);
    const double value = std::fabs(type.value(bits));
    if (type.is_integer || (value < 64 && value > 1.0 / 64)) return bits;
  }
}

struct Product {
  const Element &a, &b;
  int k;
};

// Register and bit position of element (row of 16 or column of 8, k), by the tables of the ISA.
struct Place {
  int reg, lane, shift;
};
Place place(const Element& type, int row, int k, bool is_a) {
  const int per_register = 32 / type.bits, block = 4 * per_register;
  const int within = k % block;
  const int reg = is_a ? 2 * (k / block) + row / 8 : k / block;
  return {reg, 4 * (row % 8) + within / per_register, type.bits * (within % per_register)};
}

void check_product(const Product& product, const exec::Isa* isa) {
  const int blocks = product.k * product.a.bits / 128;
  const std::string shape = "m16n8k" + std::to_string(product.k);
  const char* sum = product.a.is_integer ? "s32" : "f32";
  SCOPED_TRACE(shape + product.a.name + product.b.name + isa->name);
  std::mt19937 random(23);
  Lanes in(32 * (3 * blocks + 4));
  std::vector<std::vector<double>> a(16, std::vector<double>(product.k)), b(8, a[0]);
  auto fill = [&](const Element& type, auto& matrix, int rows, int first, bool is_a) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < product.k; ++k) {
        const uint32_t bits = random_element(type, random);
        matrix[row][k] = type.value(bits);
        const Place p = place(type, row, k, is_a);
        in[32 * (first + p.reg) + p.lane] |= bits << p.shift;
      }
    }
  };
  fill(product.a, a, 16, 0, true);
  fill(product.b, b, 8, 2 * blocks, false);
  for (int i = 0; i < 128; ++i) {
    const int x = static_cast<int>(random() % 2001) - 1000;
    in[32 * 3 * blocks + i] =
        product.a.is_integer ? static_cast<uint32_t>(x) : std::bit_cast<uint32_t>(x / 16.0f);
  }
  auto list = [](int first, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i ? ", %r" : "%r") + std::to_string(first + i);
    return "{" + text + "}";
  };
  const Lanes out =
      run_warp("mma.sync.aligned." + shape + ".row.col." + sum + "." + product.a.name + "." +
                   product.b.name + "." + sum + " " + list(40, 4) + ", " + list(10, 2 * blocks) +
                   ", " + list(10 + 2 * blocks, blocks) + ", " + list(10 + 3 * blocks, 4) + ";\n",
               in, 4, isa);
  for (int r = 0; r < 4; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      const uint32_t c = in[32 * (3 * blocks + r) + lane];
      if (product.a.is_integer) {
        int64_t want = static_cast<int32_t>(c);
        for (int k = 0; k < product.k; ++k) want += static_cast<int64_t>(a[row][k] * b[column][k]);
        ASSERT_EQ(out[32 * r + lane], static_cast<uint32_t>(want));
        continue;
      }
      float want = std::bit_cast<float>(c);  // fp32 in the order of k, one rounding a product
      for (int k = 0; k < product.k; ++k) {
        want = static_cast<float>(std::fma(a[row][k], b[column][k], static_cast<double>(want)));
      }
      ASSERT_EQ(std::bit_cast<float>(out[32 * r + lane]), want) << "row " << row << ", " << column;
    }
  }
}

TEST(WarpOpcodes, MatrixProducts) {
  const Product products[] = {
      {kF16, kF16, 8},    {kF16, kF16, 16},   {kBf16, kBf16, 8},  {kBf16, kBf16, 16},
      {kTf32, kTf32, 4},  {kTf32, kTf32, 8},  {kE4m3, kE4m3, 32}, {kE5m2, kE5m2, 32},
      {kE4m3, kE5m2, 32}, {kE5m2, kE4m3, 32}, {kE4m3, kE4m3, 16}, {kS8, kS8, 16},
      {kS8, kS8, 32},     {kU8, kS8, 32},     {kS8, kU8, 32},     {kU8, kU8, 32}};
  for (const exec::Isa* isa : exec::available_isas()) {
    for (const Product& product : products) check_product(product, isa);
  }
}

// Results may take the place of operands.
TEST(WarpOpcodes, MatrixProductInPlace) {
  Lanes in(32 * 10);
  for (int i = 0; i < 128; ++i) in[i] = 0x3f803f80;    // A: ones of bf16
  for (int i = 128; i < 192; ++i) in[i] = 0x40004000;  // B: twos
  for (int i = 192; i < 320; ++i) in[i] = 0x3f800000;  // C: ones
  const Lanes out = run_warp(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r18, %r19, %r16, %r17}, "
      "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};\n"
      "mov.u32 %r40, %r16;\nmov.u32 %r41, %r17;\nmov.u32 %r42, %r18;\nmov.u32 %r43, %r19;\n",
      in, 4);
  for (uint32_t x : out) EXPECT_EQ(std::bit_cast<float>(x), 33.0f);
}

}  // namespace
}  // namespace gpu_emulator
