// Loads, stores and atomic operations of every width, space and type.

#include <random>

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

constexpr int kThreads = 64;

// %r1: thread; %rd10, %rd11: this thread's 64 bytes of the first and the second argument.
std::string with_cells(const std::string& body) {
  return "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd12, %r1, 64;\nadd.u64 %rd10, %rd0, %rd12;\n"
         "add.u64 %rd11, %rd1, %rd12;\n" +
         body;
}

struct alignas(64) Cell {
  uint8_t bytes[64];
};

struct Cells {
  std::vector<Cell> in = std::vector<Cell>(kThreads), out = std::vector<Cell>(kThreads);

  Cells() {
    std::mt19937 random(5);
    for (int i = 0; i < 64 * kThreads; ++i) {
      in[i / 64].bytes[i % 64] = static_cast<uint8_t>(random());
      out[i / 64].bytes[i % 64] = 0xcc;
    }
  }
  Report run(const std::string& body, int shared = 0) {
    KernelRunner runner(kernel(with_cells(body), 2, shared));
    runner.add(in);
    runner.add(out);
    runner.launch.block = {kThreads, 1, 1};
    return runner.run();
  }
};

std::string list(const std::string& prefix, int first, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += (i ? ", " : "") + prefix + std::to_string(first + i);
  }
  return count == 1 ? text : "{" + text + "}";
}

struct Width {
  const char* vector;
  int count;
  const char* type;
  int bytes;
};
const Width kWidths[] = {
    {"", 1, "b8", 1},     {"", 1, "b16", 2},    {"", 1, "b32", 4},    {"", 1, "b64", 8},
    {".v2", 2, "b8", 1},  {".v4", 4, "b8", 1},  {".v2", 2, "b16", 2}, {".v4", 4, "b16", 2},
    {".v2", 2, "b32", 4}, {".v4", 4, "b32", 4}, {".v2", 2, "b64", 8}, {".v4", 4, "b64", 8},
    {".v8", 8, "b32", 4},
};

std::string registers(const Width& width) {
  const std::string prefix = width.bytes == 8 ? "%rd" : "%r";
  return list(prefix, 20, width.count);
}

// From the first cells through a space to the second: every byte arrives, no other is touched.
TEST(Memory, CopiesOfEveryWidthThroughEverySpace) {
  struct Path {
    const char *name, *store_space, *address;
    int shared;
  };
  const std::string setup =
      "mul.lo.u32 %r2, %r1, 64;\nadd.u32 %r3, %r63, %r2;\ncvt.u64.u32 %rd15, %r63;\n"
      "cvt.u64.u32 %rd13, %r3;\ncvta.shared.u64 %rd14, %rd13;\n";
  const Path paths[] = {{"global", "global", "%rd11", 0},
                        {"generic", "", "%rd11", 0},
                        {"shared", "shared", "%r3", 64 * kThreads},
                        {"generic shared", "", "%rd14", 64 * kThreads}};
  for (const Path& path : paths) {
    for (const Width& width : kWidths) {
      SCOPED_TRACE(std::string(path.name) + width.vector + "." + width.type);
      const std::string space = *path.store_space ? std::string(".") + path.store_space : "";
      const std::string type = std::string(width.vector) + "." + width.type;
      std::string body = path.shared ? setup : "";
      body += "ld.global" + type + " " + registers(width) + ", [%rd10];\n";
      body += "st" + space + type + " [" + path.address + "], " + registers(width) + ";\n";
      if (path.shared) {
        body += "ld" + space + type + " " + registers(width) + ", [" + path.address + "];\n";
        body += "st.global" + type + " [%rd11], " + registers(width) + ";\n";
      }
      Cells cells;
      ASSERT_EQ(cells.run(body, path.shared).text, "");
      const int bytes = width.count * width.bytes;
      for (int t = 0; t < kThreads; ++t) {
        for (int i = 0; i < 64; ++i) {
          ASSERT_EQ(cells.out[t].bytes[i], i < bytes ? cells.in[t].bytes[i] : 0xcc)
              << "thread " << t << ", byte " << i;
        }
      }
    }
  }
}

TEST(Memory, LoadsExtendBySign) {
  Cells cells;
  const char* body =
      "ld.global.s8 %r20, [%rd10];\nld.global.u8 %r21, [%rd10];\nld.global.s16 %r22, [%rd10+2];\n"
      "ld.global.s8 %rd20, [%rd10];\nld.global.s32 %rd21, [%rd10+4];\nld.global.u16 %h1, [%rd10];\n"
      "st.global.v4.b32 [%rd11], {%r20, %r21, %r22, %r22};\n"
      "st.global.v2.b64 [%rd11+16], {%rd20, %rd21};\nst.global.u16 [%rd11+32], %h1;\n";
  ASSERT_EQ(cells.run(body).text, "");
  for (int t = 0; t < kThreads; ++t) {
    const uint8_t *in = cells.in[t].bytes, *out = cells.out[t].bytes;
    int16_t half;
    int32_t word, got32[4];
    int64_t got64[2];
    std::memcpy(&half, in + 2, 2);
    std::memcpy(&word, in + 4, 4);
    std::memcpy(got32, out, 16);
    std::memcpy(got64, out + 16, 16);
    EXPECT_EQ(got32[0], static_cast<int8_t>(in[0]));
    EXPECT_EQ(got32[1], in[0]);
    EXPECT_EQ(got32[2], half);
    EXPECT_EQ(got64[0], static_cast<int8_t>(in[0]));
    EXPECT_EQ(got64[1], word);
    EXPECT_EQ(std::memcmp(in, out + 32, 2), 0);
  }
}

TEST(Memory, LocalMemoryIsPerLane) {
  Cells cells;
  const char* body =
      ".local .align 16 .b8 scratch[64];\nmov.u64 %rd20, scratch;\ncvta.local.u64 %rd21, %rd20;\n"
      "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd10];\n"
      "st.local.v4.b32 [%rd20+16], {%r20, %r21, %r22, %r23};\nbar.sync 0;\n"
      "ld.v4.b32 {%r24, %r25, %r26, %r27}, [%rd21+16];\n"
      "st.global.v4.b32 [%rd11], {%r24, %r25, %r26, %r27};\n";
  ASSERT_EQ(cells.run(body).text, "");
  for (int t = 0; t < kThreads; ++t) {
    EXPECT_EQ(std::memcmp(cells.in[t].bytes, cells.out[t].bytes, 16), 0) << "thread " << t;
  }
}

TEST(Memory, IsspacepTellsTheSpace) {
  Cells cells;
  const char* body =
      ".local .b32 here;\nmov.u64 %rd20, here;\ncvta.local.u64 %rd21, %rd20;\n"
      "cvt.u64.u32 %rd22, %r63;\ncvta.shared.u64 %rd23, %rd22;\n"
      "isspacep.global %p0, %rd0;\nisspacep.shared %p1, %rd23;\nisspacep.local %p2, %rd21;\n"
      "isspacep.global %p3, %rd23;\nselp.u32 %r20, 1, 0, %p0;\nselp.u32 %r21, 1, 0, %p1;\n"
      "selp.u32 %r22, 1, 0, %p2;\nselp.u32 %r23, 1, 0, %p3;\n"
      "st.global.v4.b32 [%rd11], {%r20, %r21, %r22, %r23};\n";
  ASSERT_EQ(cells.run(body, 16).text, "");
  const uint32_t want[4] = {1, 1, 1, 0};
  EXPECT_EQ(std::memcmp(cells.out[0].bytes, want, 16), 0);
}

TEST(Memory, BadAddressesAreReported) {
  struct Fault {
    const char *body, *kind, *text;
  };
  const Fault faults[] = {
      {"ld.global.b32 %r2, [%rd0+4096];\n", "wild_pointer", "past the end of the test memory"},
      {"mov.u64 %rd2, 64;\nld.global.b32 %r2, [%rd2];\n", "wild_pointer", "nothing is allocated"},
      {"ld.global.b32 %r2, [%rd0+2];\n", "misaligned", "multiple of 4"},
      {"ld.global.v4.b32 {%r2,%r3,%r4,%r5}, [%rd0+8];\n", "misaligned", "multiple of 16"},
      {"ld.shared.b32 %r2, [%r63+256];\n", "out_of_bounds", "256 bytes of shared memory"},
      {"mov.u32 %r2, 0;\nst.shared.b32 [%r2], %r2;\n", "out_of_bounds", "shared address 0x0"},
      {"mov.u64 %rd2, 0;\natom.global.add.u32 %r2, [%rd2], 1;\n", "wild_pointer", "atomic"},
  };
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.body);
    Cells cells;
    const Report report = cells.run(fault.body, 256);
    EXPECT_EQ(report.kind, fault.kind);
    EXPECT_NE(report.text.find(fault.text), std::string::npos) << report.text;
    EXPECT_NE(report.text.find("kernel k, CTA (0,0,0), warp 0, lane 0, PTX line"),
              std::string::npos)
        << report.text;
  }
}

// ----------------------------------------------------------------------------------------- atomics

// What 64 threads leave behind, each with its thread index as operand (5 where order would matter).
bool depends_on_order(const std::string& op) { return op == "inc" || op == "dec"; }

uint64_t sequential(const std::string& op, uint64_t start, bool is_signed, int bits) {
  uint64_t value = start;
  const uint64_t ones = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  for (uint64_t thread = 0; thread < kThreads; ++thread) {
    const uint64_t t = depends_on_order(op) ? 5 : thread;
    const auto sign = [&](uint64_t x) {
      return static_cast<int64_t>(x << (64 - bits)) >> (64 - bits);
    };
    const bool less = is_signed ? sign(t) < sign(value) : t < value;
    if (op == "add") value += t;
    if (op == "and") value &= t;
    if (op == "or") value |= t;
    if (op == "xor") value ^= t;
    if (op == "min" && less) value = t;
    if (op == "max" && !less) value = t;
    if (op == "inc") value = value >= t ? 0 : value + 1;
    if (op == "dec") value = value == 0 || value > t ? t : value - 1;
    value &= ones;
  }
  return value;
}

TEST(Atomics, IntegerOperations) {
  struct Case {
    const char *op, *type;
    int bits;
  };
  const Case cases[] = {{"add", "u32", 32}, {"add", "s32", 32}, {"add", "u64", 64},
                        {"min", "s32", 32}, {"min", "u32", 32}, {"max", "s32", 32},
                        {"max", "u64", 64}, {"min", "s64", 64}, {"and", "b32", 32},
                        {"or", "b64", 64},  {"xor", "b32", 32}, {"inc", "u32", 32},
                        {"dec", "u32", 32}};
  for (const Case& c : cases) {
    for (const char* form : {"atom.global", "red.global", "atom.relaxed.cta.shared"}) {
      SCOPED_TRACE(std::string(form) + "." + c.op + "." + c.type);
      const bool shared = std::strstr(form, "shared") != nullptr;
      const bool wide = c.bits == 64;
      const std::string address = shared ? "[%r63]" : "[%rd0]";
      const std::string source = depends_on_order(c.op) ? "5" : wide ? "%rd9" : "%r1";
      const std::string result = std::strncmp(form, "red", 3) ? (wide ? "%rd8, " : "%r8, ") : "";
      std::string body = "mov.u32 %r1, %tid.x;\ncvt.u64.u32 %rd9, %r1;\n";
      if (shared) {
        body +=
            "setp.eq.u32 %p0, %r1, 0;\n@%p0 ld.global.b64 %rd2, [%rd0];\n"
            "@%p0 st.shared.b64 [%r63], %rd2;\nbar.sync 0;\n";
      }
      body += std::string(form) + "." + c.op + "." + c.type + " " + result + address + ", " +
              source + ";\n";
      if (shared) {
        body +=
            "bar.sync 0;\nld.shared.b64 %rd2, [%r63];\n"
            "@%p0 st.global.b64 [%rd0], %rd2;\n";
      }
      const uint64_t start = wide ? 0x8000000000000011u : 0x80000011u;
      std::vector<uint64_t> cell = {start};
      KernelRunner runner(kernel(body, 1, 16));
      runner.add(cell);
      runner.launch.block = {kThreads, 1, 1};
      ASSERT_EQ(runner.run().text, "");
      EXPECT_EQ(cell[0], sequential(c.op, start, c.type[0] == 's', c.bits));
    }
  }
}

TEST(Atomics, FloatsAndVectors) {
  // Four CTAs add; sums of small integers are exact in every type.
  const char* body =
      "mov.u32 %r1, 0x3f800000;\nmov.u32 %r2, 0x3c003c00;\nmov.u32 %r3, 0x3f803f80;\n"
      "mov.u64 %rd1, 0x3ff0000000000000;\n"
      "red.global.add.f32 [%rd0], %r1;\nred.global.add.f64 [%rd0+8], %rd1;\n"
      "red.global.add.noftz.f16x2 [%rd0+16], %r2;\n"
      "red.global.add.noftz.bf16x2 [%rd0+20], %r3;\n"
      "red.global.add.v4.f32 [%rd0+32], {%r1, %r1, %r1, %r1};\n"
      "atom.global.add.v2.f32 {%r8, %r9}, [%rd0+48], {%r1, %r1};\n";
  std::vector<uint8_t> memory(64);
  KernelRunner runner(kernel(body, 1));
  runner.add(memory);
  runner.launch.grid = {4, 1, 1};
  runner.launch.block = {32, 1, 1};
  runner.options.threads = 2;
  ASSERT_EQ(runner.run().text, "");
  float f[16];
  double d;
  uint32_t halves[2];
  std::memcpy(f, memory.data(), 64);
  std::memcpy(&d, &memory[8], 8);
  std::memcpy(halves, &memory[16], 8);
  EXPECT_EQ(f[0], 128);
  EXPECT_EQ(d, 128);
  EXPECT_EQ(halves[0], 0x58005800u);  // 128 of f16
  EXPECT_EQ(halves[1], 0x43004300u);  // 128 of bf16
  for (int i = 8; i < 14; ++i) EXPECT_EQ(f[i], 128);
}

TEST(Atomics, ExchangeAndCompareAndSwap) {
  // Each thread takes a ticket with cas; every ticket is given once.
  const char* body =
      "mov.u32 %r1, %tid.x;\nAGAIN:\nld.relaxed.gpu.global.b32 %r2, [%rd0];\nadd.u32 %r3, %r2, 1;\n"
      "atom.global.cas.b32 %r4, [%rd0], %r2, %r3;\nsetp.ne.u32 %p0, %r4, %r2;\n@%p0 bra AGAIN;\n"
      "mul.wide.u32 %rd2, %r2, 4;\nadd.u64 %rd3, %rd1, %rd2;\n"
      "atom.global.exch.b32 %r5, [%rd3], 1;\nst.global.b32 [%rd3+512], %r5;\n";
  std::vector<uint32_t> counter(1), tickets(256);
  KernelRunner runner(kernel(body, 2));
  runner.add(counter);
  runner.add(tickets);
  runner.launch.block = {32, 1, 1};
  runner.launch.grid = {4, 1, 1};
  ASSERT_EQ(runner.run().text, "");
  EXPECT_EQ(counter[0], 128u);
  for (int i = 0; i < 128; ++i) {
    EXPECT_EQ(tickets[i], 1u);
    EXPECT_EQ(tickets[i + 128], 0u);
  }
}

// ---------------------------------------------------------------------------------------- counters

TEST(Counters, SectorsAndBankConflicts) {
  struct Case {
    int stride;  // bytes between threads
    uint64_t sectors, wavefronts;
  };
  for (const Case& c : {Case{4, 4, 1}, Case{8, 8, 2}, Case{128, 32, 32}, Case{0, 1, 1}}) {
    SCOPED_TRACE(c.stride);
    const std::string stride = std::to_string(c.stride);
    const std::string body = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd1, %r1, " + stride +
                             ";\nadd.u64 %rd2, %rd0, %rd1;\nld.global.b32 %r2, [%rd2];\n"
                             "mul.lo.u32 %r3, %r1, " +
                             stride + ";\nadd.u32 %r3, %r63, %r3;\nst.shared.b32 [%r3], %r1;\n";
    std::vector<uint32_t> memory(1024 + 8);
    KernelRunner runner(kernel(body, 1, 4096));
    while (reinterpret_cast<uint64_t>(memory.data()) % 32) memory.insert(memory.begin(), 0);
    runner.add(memory);
    runner.launch.block = {32, 1, 1};
    runner.options.checks = exec::Checks::parse("all-race");
    ASSERT_EQ(runner.run().text, "");
    const KernelCounters& kernel = runner.counters.kernels.at("k");
    for (const LineCounters& line : kernel.lines) {
      if (line.text.starts_with("ld.global")) {
        EXPECT_EQ(line.sectors, c.sectors);
        EXPECT_EQ(line.requests, 1u);
        EXPECT_EQ(line.bytes, 128u);
      }
      if (line.text.starts_with("st.shared")) {
        EXPECT_EQ(line.wavefronts, c.wavefronts);
        EXPECT_EQ(line.ideal_wavefronts, 1u);
      }
    }
    EXPECT_EQ(kernel.warp_instructions(), 10u);
  }
}

}  // namespace
}  // namespace gpu_emulator
