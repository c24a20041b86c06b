// Micro-kernels written with CUTLASS, an independent witness of layouts, descriptors and pipelines.
// The build makes their PTX where it finds nvcc and CUTLASS's headers (PyPI: nvidia-cutlass).

#include <cmath>
#include <fstream>
#include <random>
#include <sstream>

#include "device/tensor_map.h"
#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

// Empty: not built.
std::string ptx_of(const std::string& name) {
  std::ifstream file(std::string(GPU_EMULATOR_CUTLASS_PTX) + "/" + name + ".ptx");
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

#define SKIP_WITHOUT(text) \
  if (text.empty()) GTEST_SKIP() << "built without nvcc or CUTLASS's headers"

struct alignas(128) Line {
  uint16_t bf16[64];
};

// rows x columns of small integers; columns is a multiple of 64.
struct Matrix {
  int rows, columns;
  std::vector<float> values;
  std::vector<Line> lines;

  Matrix(int rows, int columns, unsigned seed)
      : rows(rows), columns(columns), values(rows * columns), lines(rows * columns / 64) {
    std::mt19937 random(seed);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<int>(random() % 17) - 8);
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      lines[i / 64].bf16[i % 64] = static_cast<uint16_t>(bits >> 16);
    }
  }
  TensorMap map(int box_rows, int box_columns, TensorSwizzle swizzle) {
    TensorMap map;
    map.base = reinterpret_cast<uint64_t>(lines.data());
    map.rank = 2;
    map.element = TensorElement::kBf16;
    map.dims[0] = static_cast<uint64_t>(columns);
    map.dims[1] = static_cast<uint64_t>(rows);
    map.strides[0] = static_cast<uint64_t>(columns) * 2;
    map.box[0] = static_cast<uint16_t>(box_columns);
    map.box[1] = static_cast<uint16_t>(box_rows);
    map.swizzle = swizzle;
    return map;
  }
};

void expect_product(const Matrix& a, const Matrix& b, const std::vector<float>& c) {
  for (int i = 0; i < a.rows; ++i) {
    for (int j = 0; j < b.rows; ++j) {
      float sum = 0;  // of small integers: exact
      for (int k = 0; k < a.columns; ++k) {
        sum += a.values[i * a.columns + k] * b.values[j * a.columns + k];
      }
      ASSERT_EQ(c[i * b.rows + j], sum) << "row " << i << " column " << j;
    }
  }
}

TEST(Cutlass, EveryOperandLayoutOfWgmma) {
  const std::string ptx = ptx_of("wgmma_layouts");
  SKIP_WITHOUT(ptx);
  KernelRunner runner(ptx);
  Matrix a(64, 64, 1), b(64, 64, 2);
  std::vector<float> c(64 * 64);
  runner.launch.block = {128, 1, 1};
  runner.add(a.lines);
  runner.add(b.lines);
  runner.add(c);
  int kernels = 0;
  for (size_t f = 0; f < runner.program().functions.size(); ++f) {
    if (!runner.program().functions[f].is_entry) continue;
    ++kernels;
    for (Mode mode : kModes) {
      SCOPED_TRACE(runner.program().functions[f].name + " " + name_of(mode));
      std::fill(c.begin(), c.end(), NAN);
      runner.launch.function = static_cast<int>(f);
      runner.options.mode = mode;
      runner.options.seed = f;
      runner.run_ok();
      expect_product(a, b, c);
    }
  }
  EXPECT_EQ(kernels, 12);
}

TEST(Cutlass, PipelinedGemmWithMulticast) {
  const std::string ptx = ptx_of("tma_gemm");
  SKIP_WITHOUT(ptx);
  Matrix a(256, 448, 1), b(128, 448, 2);
  std::vector<float> c(256 * 128);
  for (Mode mode : kModes) {
    for (uint64_t seed : {1, 2, 3}) {
      SCOPED_TRACE(std::string(name_of(mode)) + " " + std::to_string(seed));
      std::fill(c.begin(), c.end(), NAN);
      KernelRunner runner(ptx);
      runner.launch.block = {256, 1, 1};
      runner.launch.grid = {4, 2, 1};
      runner.launch.dynamic_shared_bytes = 3 * 2 * 64 * 64 * 2 + 1024;
      runner.options.mode = mode;
      runner.options.seed = seed;
      runner.argument_bytes(a.map(64, 64, TensorSwizzle::k128B));
      runner.argument_bytes(b.map(32, 64, TensorSwizzle::k128B));
      runner.map_memory(reinterpret_cast<uint64_t>(a.lines.data()), a.lines.size() * 128);
      runner.map_memory(reinterpret_cast<uint64_t>(b.lines.data()), b.lines.size() * 128);
      runner.add(c);
      runner.argument(uint64_t{128} | uint64_t{448} << 32);  // int n, k
      runner.run_ok();
      expect_product(a, b, c);
      if (mode != Mode::kRandom) break;
    }
  }
}

TEST(Cutlass, GemmForSm80) {
  const std::string ptx = ptx_of("sm80_gemm");
  SKIP_WITHOUT(ptx);
  Matrix a(128, 192, 1), b(64, 192, 2);
  std::vector<float> c(128 * 64);
  for (Mode mode : kModes) {
    SCOPED_TRACE(name_of(mode));
    std::fill(c.begin(), c.end(), NAN);
    KernelRunner runner(ptx);
    runner.launch.block = {128, 1, 1};
    runner.launch.grid = {2, 1, 1};
    runner.options.mode = mode;
    runner.add(a.lines);
    runner.add(b.lines);
    runner.add(c);
    runner.argument(uint64_t{64} | uint64_t{192} << 32);  // int n, k
    runner.run_ok();
    expect_product(a, b, c);
  }
}

}  // namespace
}  // namespace gpu_emulator
