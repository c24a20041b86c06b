#pragma once

// Tests of opcodes as a table: an instruction, and what it computes as a function on the host. A
// kernel made from the row executes it for many operands, on every instruction set of this machine.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "exec/isa.h"
#include "support/kernel_runner.h"

namespace gpu_emulator::opcode_test {

enum class Compare { kBits, kFloat, kDouble, kHalf, kHalf2 };

struct Row {
  std::string opcode;    // "add.sat.s32"
  std::string operands;  // of destination and sources: p (predicate), h, r, d: 0, 16, 32, 64 bits;
                         // "h2", "b2": as r, values are pairs of f16 or bf16
  std::function<uint64_t(uint64_t, uint64_t, uint64_t, uint64_t)> expected;
  Compare compare = Compare::kBits;
  double tolerance = 0;     // kFloat: in units in the last place
  std::string suffix = {};  // further operands: ", 0x96"
};

// ---------------------------------------------------- host functions of typed arguments as a Row's

template <class T>
T from_bits(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<uint32_t>(bits));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(bits);
  else
    return static_cast<T>(bits);
}

template <class T>
uint64_t to_bits(T value) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<uint32_t>(value);
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<uint64_t>(value);
  else if constexpr (sizeof(T) < 4)
    return static_cast<std::make_unsigned_t<T>>(value);
  else if constexpr (std::is_same_v<T, int32_t>)
    return static_cast<uint32_t>(value);
  else
    return static_cast<uint64_t>(value);
}

// f of as many arguments of type T as it takes.
template <class T, class F>
std::function<uint64_t(uint64_t, uint64_t, uint64_t, uint64_t)> of(F f) {
  return [f](uint64_t a, uint64_t b, uint64_t c, uint64_t d) -> uint64_t {
    const T x = from_bits<T>(a), y = from_bits<T>(b), z = from_bits<T>(c), w = from_bits<T>(d);
    if constexpr (std::is_invocable_v<F, T, T, T, T>)
      return to_bits(f(x, y, z, w));
    else if constexpr (std::is_invocable_v<F, T, T, T>)
      return to_bits(f(x, y, z));
    else if constexpr (std::is_invocable_v<F, T, T>)
      return to_bits(f(x, y));
    else
      return to_bits(f(x));
  };
}

// ---------------------------------------------------------------------------------------- operands

inline std::vector<uint64_t> edge_values() {
  return {0,
          1,
          2,
          3,
          31,
          32,
          33,
          63,
          64,
          0xff,
          0x7fff,
          0x8000,
          0xffff,
          0x3c00,      // 1 of f16
          0xbc003c00,  // -1, 1 of f16x2
          0x7c00fc00,  // inf, -inf
          0x7e017c01,  // NaNs of f16
          0x000183ff,  // subnormals of f16
          0x7fffffff,
          0x80000000,
          0xffffffff,
          0x3f800000,  // 1.0f
          0xbf800000,  // -1.0f
          0x00000001,  // smallest subnormal
          0x807fffff,  // largest negative subnormal
          0x00800000,  // smallest normal
          0x7f7fffff,  // largest
          0x7f800000,  // infinity
          0xff800000,
          0x7fc00000,  // NaN
          0x4b000001,  // 2^23 + 1
          0x4f000000,  // 2^31
          0xcf000000,  // -2^31
          0x3f000000,  // 0.5
          0x3fc00000,  // 1.5
          0xc0200000,  // -2.5
          0x42b00000,  // 88
          0xc3160000,  // -150
          0x7fffffffffffffff,
          0x8000000000000000,
          0xffffffffffffffff,
          0x3ff0000000000000,  // 1.0
          0xbff8000000000000,  // -1.5
          0x7ff0000000000000,
          0x7ff8000000000000,
          0x0000000000000001,
          0x123456789abcdef0};
}

// Value i of operand k: edges against edges first, then random bits and moderate floats.
inline uint64_t operand_value(size_t i, int k, std::mt19937_64& random) {
  static const std::vector<uint64_t> edges = edge_values();
  const size_t n = edges.size();
  if (i < n * n) return k == 0 ? edges[i % n] : k == 1 ? edges[i / n] : edges[random() % n];
  switch (random() % 4) {
    case 0:
      return random();
    case 1:
      return random() % 70;
    case 2:
      return std::bit_cast<uint32_t>(static_cast<float>(static_cast<int64_t>(random())) * 1e-17f);
    default:
      return std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(random())) * 1e-17);
  }
}

// -------------------------------------------------------------------------------------- the kernel

inline std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> list;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    list.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return list;
}

// Loads source k into a register of its class, from the 64-bit cell %rd(20 + k).
inline std::string load_source(char kind, int k) {
  const std::string n = std::to_string(20 + k), small = std::to_string(k + 1);
  switch (kind) {
    case 'd':
      return "";
    case 'h':
      return "cvt.u16.u64 %h" + small + ", %rd" + n + ";\n";
    case 'p':
      return "and.b64 %rd19, %rd" + n + ", 1;\nsetp.ne.u64 %p" + small + ", %rd19, 0;\n";
    default:
      return "cvt.u32.u64 %r" + n + ", %rd" + n + ";\n";
  }
}

inline std::string source_name(char kind, int k) {
  switch (kind) {
    case 'd':
      return "%rd" + std::to_string(20 + k);
    case 'h':
      return "%h" + std::to_string(k + 1);
    case 'p':
      return "%p" + std::to_string(k + 1);
    default:
      return "%r" + std::to_string(20 + k);
  }
}

inline std::string opcode_kernel(const Row& row) {
  const std::vector<std::string> operands = words(row.operands);
  const int sources = static_cast<int>(operands.size()) - 1;
  std::string body =
      "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\n"
      "mad.lo.u32 %r1, %r2, %r3, %r1;\nmul.wide.u32 %rd10, %r1, 32;\nadd.u64 %rd11, %rd0, %rd10;\n"
      "mul.wide.u32 %rd12, %r1, 8;\nadd.u64 %rd13, %rd1, %rd12;\n";
  std::string names;
  for (int k = 0; k < sources; ++k) {
    body += "ld.global.u64 %rd" + std::to_string(20 + k) + ", [%rd11+" + std::to_string(8 * k) +
            "];\n" + load_source(operands[k + 1][0], k);
    names += ", " + source_name(operands[k + 1][0], k);
  }
  const char kind = operands[0][0];
  const std::string d = kind == 'd' ? "%rd30" : kind == 'h' ? "%h0" : kind == 'p' ? "%p0" : "%r30";
  body += row.opcode + " " + d + names + row.suffix + ";\n";
  if (kind == 'h') body += "cvt.u64.u16 %rd30, %h0;\n";
  if (kind == 'p') body += "selp.u64 %rd30, 1, 0, %p0;\n";
  if (kind == 'r') body += "cvt.u64.u32 %rd30, %r30;\n";
  return body + "st.global.u64 [%rd13], %rd30;\n";
}

// --------------------------------------------------------------------------------------- comparing

inline bool is_nan_half(uint64_t bits) { return (bits & 0x7fff) > 0x7c00; }

inline bool agrees(const Row& row, uint64_t got, uint64_t want) {
  if (got == want) return true;
  switch (row.compare) {
    case Compare::kFloat: {
      const float x = from_bits<float>(got), y = from_bits<float>(want);
      if (std::isnan(x) && std::isnan(y)) return true;
      if (!std::isfinite(x) || !std::isfinite(y)) return false;
      const float unit = std::nextafter(std::fabs(y), INFINITY) - std::fabs(y);
      return std::fabs(static_cast<double>(x) - y) <= row.tolerance * unit;
    }
    case Compare::kDouble:
      return std::isnan(from_bits<double>(got)) && std::isnan(from_bits<double>(want));
    case Compare::kHalf:
      return is_nan_half(got) && is_nan_half(want);
    case Compare::kHalf2:
      return ((got & 0xffff) == (want & 0xffff) || (is_nan_half(got) && is_nan_half(want))) &&
             (got >> 16 == want >> 16 || (is_nan_half(got >> 16) && is_nan_half(want >> 16)));
    default:
      return false;
  }
}

inline uint64_t truncated(const std::string& kind, uint64_t value) {
  switch (kind[0]) {
    case 'd':
      return value;
    case 'h':
      return value & 0xffff;
    case 'p':
      return value & 1;
    default:
      return value & 0xffffffff;
  }
}

inline void check_row(const Row& row, const exec::Isa* isa) {
  SCOPED_TRACE(row.opcode + " on " + isa->name);
  constexpr size_t kThreads = 3072;
  const std::vector<std::string> operands = words(row.operands);
  std::vector<uint64_t> inputs(4 * kThreads), results(kThreads);
  std::mt19937_64 random(17);
  for (size_t i = 0; i < kThreads; ++i) {
    for (int k = 0; k < 4; ++k) inputs[4 * i + k] = operand_value(i, k, random);
  }
  KernelRunner runner(kernel(opcode_kernel(row), 2), isa);
  runner.add(inputs);
  runner.add(results);
  runner.launch.block = {128, 1, 1};
  runner.launch.grid = {kThreads / 128, 1, 1};
  const Report report = runner.run();
  ASSERT_EQ(report.text, "");
  for (size_t i = 0; i < kThreads; ++i) {
    uint64_t in[4] = {};
    for (size_t k = 0; k + 1 < operands.size(); ++k) {
      in[k] = truncated(operands[k + 1], inputs[4 * i + k]);
    }
    const uint64_t want = truncated(operands[0], row.expected(in[0], in[1], in[2], in[3]));
    ASSERT_PRED3(agrees, row, results[i], want)
        << std::hex << "operands 0x" << in[0] << ", 0x" << in[1] << ", 0x" << in[2] << ", 0x"
        << in[3] << ": got 0x" << results[i] << ", want 0x" << want;
  }
}

inline void PrintTo(const Row& row, std::ostream* out) { *out << row.opcode; }

inline void check_table(const std::vector<Row>& rows) {
  for (const exec::Isa* isa : exec::available_isas()) {
    for (const Row& row : rows) check_row(row, isa);
  }
}

}  // namespace gpu_emulator::opcode_test
