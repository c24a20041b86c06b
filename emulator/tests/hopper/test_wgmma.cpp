// wgmma in kernels: types, operands in registers and in shared memory, groups, modes, faults. The
// layouts of operands are also tested with CUTLASS's descriptors, in tests/cutlass.

#include <array>
#include <cmath>
#include <random>

#include "exec/number_formats.h"
#include "exec/swizzle.h"
#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

constexpr int kM = 64, kThreads = 128;
constexpr uint32_t kB = 16384;  // offset of B in shared memory; A is at 0
constexpr int kSharedBytes = 40960;

struct Types {
  const char *d, *a, *b;
  int bytes;  // of an element of A and B
};

struct Form {
  Types types;
  int n;
  bool a_in_registers = false;
  bool mn_major = false;  // A (in shared memory) and B
  uint32_t swizzle = 0;
  bool accumulate = true;
  bool negate_a = false, negate_b = false;

  int k() const { return 32 / types.bytes; }
  bool integer() const { return std::string(types.d) == "s32"; }
  bool half() const { return std::string(types.d) == "f16"; }
  int registers() const { return half() ? n / 4 : n / 2; }
};

float decode(const std::string& type, uint32_t bits) {
  if (type == "f16") return exec::f16_to_float(bits);
  if (type == "bf16") return exec::bf16_to_float(bits);
  if (type == "e4m3") return exec::e4m3_to_float(bits);
  if (type == "e5m2") return exec::e5m2_to_float(bits);
  if (type == "s8") return static_cast<int8_t>(bits);
  if (type == "u8") return static_cast<uint8_t>(bits);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t encode(const std::string& type, float x) {
  if (type == "f16") return exec::to_small(x, exec::kF16Format, {});
  if (type == "bf16") return exec::to_small(x, exec::kBf16Format, {});
  if (type == "e4m3") return exec::to_small(x, exec::kE4m3Format, {});
  if (type == "e5m2") return exec::to_small(x, exec::kE5m2Format, {});
  if (type == "s8") return static_cast<uint8_t>(static_cast<int>(x));
  if (type == "u8") return static_cast<uint8_t>(std::abs(static_cast<int>(x)));
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// One operand of `rows` rows: values, and its image in shared memory with the descriptor's offsets.
struct Operand {
  int rows, k;
  std::vector<uint32_t> bits;
  std::vector<std::byte> image;
  uint64_t descriptor;  // without the address

  Operand(const Form& form, const std::string& type, int rows, unsigned seed)
      : rows(rows), k(form.k()), bits(static_cast<size_t>(rows) * k), image(16384) {
    std::mt19937 random(seed);
    for (uint32_t& x : bits) {
      x = encode(type, static_cast<float>(static_cast<int>(random() % 9) - 4));
    }
    const uint32_t w = form.swizzle;
    uint32_t leading, stride;
    if (!form.mn_major) {
      leading = 128;
      stride = w ? 8 * w : 256;
    } else {
      leading = w ? 16 * w : 128;  // none: between the two groups of 8 k
      stride = w ? 8 * w : 256;
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < k; ++c) {
        const uint32_t place = form.mn_major ? mn_place(r, c, w, leading, stride)
                                             : k_place(r, c * form.types.bytes, w, leading, stride);
        std::memcpy(&image.at(place), &bits[r * k + c], form.types.bytes);
      }
    }
    constexpr uint64_t kCodes[] = {0, 3, 2, 0, 1};  // of width / 32
    descriptor = uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | kCodes[w / 32] << 62;
  }

  static uint32_t k_place(int r, int byte, uint32_t w, uint32_t leading, uint32_t stride) {
    const auto row = static_cast<uint32_t>(r), b = static_cast<uint32_t>(byte);
    if (!w) return row / 8 * stride + row % 8 * 16 + b / 16 * leading + b % 16;
    return exec::swizzled(row / 8 * stride + row % 8 * w + b, w);
  }
  static uint32_t mn_place(int r, int c, uint32_t w, uint32_t leading, uint32_t stride) {
    const auto byte = static_cast<uint32_t>(2 * r), k = static_cast<uint32_t>(c);
    if (!w) return byte / 16 * stride + k % 8 * 16 + k / 8 * leading + byte % 16;
    return exec::swizzled(byte / w * leading + byte % w + k % 8 * w + k / 8 * stride, w);
  }
  double at(const std::string& type, int r, int c) const { return decode(type, bits[r * k + c]); }
};

std::string list(const char* prefix, int count) {
  std::string text = "{";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + (prefix + std::to_string(i));
  return text + "}";
}

// p0: image of A, p1: image of B (16 KiB each), p2: D in and out [register][thread], p3: A in
// registers [register][thread].
std::string wgmma_instruction(const Form& form) {
  std::string text = std::string("wgmma.mma_async.sync.aligned.m64n") + std::to_string(form.n) +
                     "k" + std::to_string(form.k()) + "." + form.types.d + "." + form.types.a +
                     "." + form.types.b + " " + list("%d", form.registers()) + ", ";
  text += form.a_in_registers ? list("%a", 4) : "%rd10";
  text += ", %rd11, %p6";
  if (!form.integer()) {
    text += form.negate_a ? ", -1" : ", 1";
    text += form.negate_b ? ", -1" : ", 1";
  }
  if (form.types.bytes == 2) {
    const std::string trans = form.mn_major ? ", 1" : ", 0";
    text += form.a_in_registers ? trans : trans + trans;
  }
  return text + ";\n";
}

std::string set_up(const Form& form, uint64_t a, uint64_t b) {
  return ".reg .b32 %d<" + std::to_string(form.registers()) + ">;\n.reg .b32 %a<4>;\n" + R"(
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 4;
  COPY:
    cvt.u64.u32 %rd4, %r1;
    add.u64 %rd5, %rd0, %rd4;
    ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd5];
    add.u32 %r6, %r63, %r1;
    st.shared.v4.u32 [%r6], {%r2, %r3, %r4, %r5};
    add.u64 %rd5, %rd1, %rd4;
    ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd5];
    st.shared.v4.u32 [%r6+16384], {%r2, %r3, %r4, %r5};
    add.u32 %r1, %r1, 2048;
    setp.lt.u32 %p0, %r1, 16384;
    @%p0 bra COPY;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shl.b32 %r7, %r0, 2;
    cvt.u64.u32 %rd4, %r7;
    add.u64 %rd6, %rd2, %rd4;
    add.u64 %rd7, %rd3, %rd4;
    shr.u32 %r8, %r63, 4;
    and.b32 %r8, %r8, 0x3fff;
    cvt.u64.u32 %rd10, %r8;
    add.u64 %rd11, %rd10, 1024;
    or.b64 %rd10, %rd10, )" +
         std::to_string(a) + R"(;
    or.b64 %rd11, %rd11, )" +
         std::to_string(b) + ";\n" + "setp.ne.u32 %p6, " + (form.accumulate ? "1" : "0") + ", 0;\n";
}

std::string move_registers(const Form& form, const std::string& opcode) {
  std::string text;
  for (int i = 0; i < form.registers(); ++i) {
    const std::string d = "%d" + std::to_string(i);
    const std::string place = "[%rd6+" + std::to_string(i * 4 * kThreads) + "]";
    text += opcode == "ld" ? "ld.global.b32 " + d + ", " + place + ";\n"
                           : "st.global.b32 " + place + ", " + d + ";\n";
  }
  return text;
}

std::string load_a() {
  std::string text;
  for (int i = 0; i < 4; ++i) {
    text += "ld.global.b32 %a" + std::to_string(i) + ", [%rd7+" + std::to_string(i * 4 * kThreads) +
            "];\n";
  }
  return text;
}

struct alignas(16) Quad {
  uint32_t x[4];
};

struct Problem {
  Form form;
  Operand a, b;
  std::vector<Quad> a_image, b_image;
  std::vector<uint32_t> d, a_registers;

  explicit Problem(const Form& form)
      : form(form),
        a(form.a_in_registers ? plain(form) : form, form.types.a, kM, 5),
        b(form, form.types.b, form.n, 6),
        a_image(1024),
        b_image(1024),
        d(static_cast<size_t>(form.registers()) * kThreads),
        a_registers(4 * kThreads) {
    std::memcpy(a_image.data(), a.image.data(), a.image.size());
    std::memcpy(b_image.data(), b.image.data(), b.image.size());
    for (uint32_t& x : d) x = form.half() ? 0x40004000 : form.integer() ? 2 : 0x40000000;
    for (int r = 0; r < kM; ++r) {
      for (int c = 0; c < form.k(); ++c) {
        const int byte = c * form.types.bytes;
        const int thread = r / 16 * 32 + r % 8 * 4 + byte % 16 / 4;
        const int reg = r % 16 / 8 + byte / 16 * 2;
        auto* word = reinterpret_cast<std::byte*>(&a_registers[reg * kThreads + thread]);
        std::memcpy(word + byte % 4, &a.bits[r * form.k() + c], form.types.bytes);
      }
    }
  }
  static Form plain(Form form) {
    form.mn_major = false;
    form.swizzle = 0;
    return form;
  }

  std::string kernel_text(const std::string& body) const {
    return kernel(set_up(form, a.descriptor, b.descriptor) + body, 4, kSharedBytes);
  }
  std::string usual_kernel() const {
    return kernel_text(load_a() + move_registers(form, "ld") + "wgmma.fence.sync.aligned;\n" +
                       wgmma_instruction(form) + "wgmma.commit_group.sync.aligned;\n" +
                       "wgmma.wait_group.sync.aligned 0;\n" + move_registers(form, "st"));
  }

  Report run(const std::string& text, Mode mode, uint64_t seed = 0) {
    KernelRunner runner(text);
    runner.launch.block = {kThreads, 1, 1};
    runner.options.mode = mode;
    runner.options.seed = seed;
    runner.add(a_image);
    runner.add(b_image);
    runner.add(d);
    runner.add(a_registers);
    return runner.run();
  }

  double result(int row, int column) const {
    const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
    const int half = row % 16 / 8;
    if (form.half()) {
      const uint32_t packed = d[(column / 8 * 2 + half) * kThreads + thread];
      return exec::f16_to_float(packed >> (column % 2 * 16) & 0xffff);
    }
    const uint32_t bits = d[(column / 8 * 4 + half * 2 + column % 2) * kThreads + thread];
    if (form.integer()) return static_cast<int32_t>(bits);
    return decode("f32", bits);
  }

  void expect_right(int times = 1) const {
    for (int row = 0; row < kM; ++row) {
      for (int column = 0; column < form.n; ++column) {
        double sum = 0;
        for (int k = 0; k < form.k(); ++k) {
          sum += a.at(form.types.a, row, k) * b.at(form.types.b, column, k);
        }
        if (form.negate_a != form.negate_b) sum = -sum;
        sum = sum * times + (form.accumulate ? 2 : 0);
        ASSERT_EQ(result(row, column), sum) << "row " << row << " column " << column;
      }
    }
  }
};

constexpr Types kBf16 = {"f32", "bf16", "bf16", 2};

void check(const Form& form) {
  for (Mode mode : kModes) {
    Problem problem(form);
    const Report report = problem.run(problem.usual_kernel(), mode, 3);
    ASSERT_EQ(report.text, "");
    problem.expect_right();
  }
}

TEST(Wgmma, TypesAndOperands) {
  const Types all[] = {kBf16,
                       {"f32", "f16", "f16", 2},
                       {"f16", "f16", "f16", 2},
                       {"f32", "tf32", "tf32", 4},
                       {"f32", "e4m3", "e5m2", 1},
                       {"f16", "e5m2", "e5m2", 1},
                       {"s32", "s8", "u8", 1},
                       {"s32", "u8", "u8", 1}};
  for (const Types& types : all) {
    for (bool a_in_registers : {false, true}) {
      SCOPED_TRACE(std::string(types.d) + types.a + types.b + (a_in_registers ? " RS" : " SS"));
      Form form{types, 32};
      form.a_in_registers = a_in_registers;
      form.swizzle = 32;
      check(form);
      form.accumulate = false;
      check(form);
    }
  }
}

TEST(Wgmma, Layouts) {
  for (uint32_t swizzle : {0u, 32u, 64u, 128u}) {
    for (bool mn_major : {false, true}) {
      SCOPED_TRACE(std::to_string(swizzle) + (mn_major ? " MN-major" : " K-major"));
      Form form{kBf16, 64};
      form.swizzle = swizzle;
      form.mn_major = mn_major;
      check(form);
    }
  }
}

TEST(Wgmma, ExtentsAndSigns) {
  for (int n : {8, 24, 136, 256}) {
    Form form{kBf16, n};
    form.swizzle = 32;
    form.negate_a = n % 16 == 8;
    form.negate_b = n == 24 || n == 256;
    check(form);
  }
}

TEST(Wgmma, GroupsInFlight) {
  // Three operations on the same accumulators in two groups; the wait leaves one in flight first.
  Form form{kBf16, 64};
  form.swizzle = 128;
  for (bool a_in_registers : {false, true}) {
    form.a_in_registers = a_in_registers;
    for (Mode mode : kModes) {
      Problem problem(form);
      const std::string text = problem.kernel_text(
          load_a() + move_registers(form, "ld") + "wgmma.fence.sync.aligned;\n" +
          wgmma_instruction(form) + wgmma_instruction(form) + "wgmma.commit_group.sync.aligned;\n" +
          wgmma_instruction(form) +
          "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"
          "wgmma.wait_group.sync.aligned 0;\n" +
          move_registers(form, "st"));
      ASSERT_EQ(problem.run(text, mode, 9).text, "");
      problem.expect_right(3);
    }
  }
}

TEST(Wgmma, LateModeShowsAMissingWait) {
  Form form{kBf16, 8};
  form.swizzle = 32;
  Problem problem(form);
  std::string text = problem.usual_kernel();
  const std::string wait = "wgmma.wait_group.sync.aligned 0;\n";
  text.replace(text.find(wait), wait.size(), "");
  const Report report = problem.run(text, Mode::kLate);
  // Poison was stored, or a check noticed it; and the warp exits with the operation in flight.
  EXPECT_NE(report.text, "");
}

TEST(Wgmma, AWriteToAccumulatorsInFlightIsReported) {
  Form form{kBf16, 8};
  form.swizzle = 32;
  Problem problem(form);
  std::string text = problem.usual_kernel();
  const std::string wait = "wgmma.wait_group.sync.aligned 0;\n";
  text.insert(text.find(wait), "mov.b32 %d1, 0;\n");
  const Report report = problem.run(text, Mode::kLate);
  EXPECT_EQ(report.kind, "wgmma_registers") << report.text;
}

TEST(Wgmma, FaultsAreReported) {
  Form form{kBf16, 8};
  form.swizzle = 32;
  Problem problem(form);
  const std::string usual = problem.usual_kernel();
  const std::string fence = "wgmma.fence.sync.aligned;\n";
  auto changed = [&](const std::string& at, const std::string& with, size_t length) {
    std::string text = usual;
    text.replace(text.find(at), length, with);
    return problem.run(text, Mode::kEager);
  };
  Report report = changed(fence, "", fence.size());
  EXPECT_EQ(report.kind, "wgmma_fence") << report.text;
  report = changed(fence, fence + "setp.gt.u32 %p6, %r0, 63;\n", fence.size());
  EXPECT_EQ(report.kind, "invalid_operand") << report.text;
  report = changed(fence, fence + "setp.gt.u32 %p6, %r0, 3;\n", fence.size());
  EXPECT_EQ(report.kind, "invalid_operand") << report.text;
  report = changed(fence, fence + "or.b64 %rd11, %rd11, 0x3f00;\n", fence.size());
  EXPECT_EQ(report.kind, "out_of_bounds") << report.text;
  report = changed(fence, fence + "setp.lt.u32 %p5, %r0, 32;\n@%p5 ret;\n", fence.size());
  EXPECT_EQ(report.kind, "deadlock") << report.text;
  report = changed(fence, fence + "and.b32 %r9, %r0, 1;\nsetp.eq.u32 %p5, %r9, 0;\n@%p5 ret;\n",
                   fence.size());
  EXPECT_EQ(report.kind, "divergence") << report.text;
}

// A function issues a product while one of its caller is in flight: their registers are not the
// same.
TEST(Wgmma, AFunctionIssuesItsOwn) {
  const std::string text = R"(
.version 8.6
.target sm_90a
.address_size 64
.func (.param .b32 result) product(.param .b64 b)
{
  .reg .b64 %rd<2>; .reg .b32 %r<5>; .reg .f32 %f<5>; .reg .pred %p;
  ld.param.b64 %rd1, [b];
  mov.b32 %r1, 0x3f803f80;
  mov.b32 %r2, %r1;
  mov.b32 %r3, %r1;
  mov.b32 %r4, %r1;
  mov.f32 %f1, 0f3f800000;
  mov.f32 %f2, %f1;
  mov.f32 %f3, %f1;
  mov.f32 %f4, %f1;
  setp.eq.u32 %p, %r1, %r2;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, %rd1, %p, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.param.b32 [result], %f1;
  ret;
}
.visible .entry k(.param .u64 out)
{
  .reg .b64 %rd<5>; .reg .b32 %r<9>; .reg .f32 %f<6>; .reg .pred %p<3>;
  .shared .align 1024 .b8 smem[256];
  ld.param.u64 %rd1, [out];
  mov.u32 %r0, %tid.x;
  mov.u32 %r5, smem;
  mov.b32 %r1, 0x3f803f80;
  mov.b32 %r2, %r1;
  mov.b32 %r3, %r1;
  mov.b32 %r4, %r1;
  shl.b32 %r6, %r0, 2;
  add.u32 %r7, %r5, %r6;
  setp.lt.u32 %p1, %r0, 64;
  @%p1 st.shared.b32 [%r7], %r1;
  fence.proxy.async;
  bar.sync 0;
  shr.u32 %r5, %r5, 4;
  cvt.u64.u32 %rd2, %r5;
  or.b64 %rd2, %rd2, 0x0000001000080000;
  mov.f32 %f1, 0f40000000;
  mov.f32 %f2, %f1;
  mov.f32 %f3, %f1;
  mov.f32 %f4, %f1;
  setp.eq.u32 %p2, %r1, %r2;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, %rd2, %p2, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  {
    .param .b64 b0; .param .b32 r0;
    st.param.b64 [b0], %rd2;
    call (r0), product, (b0);
    ld.param.b32 %f5, [r0];
  }
  wgmma.wait_group.sync.aligned 0;
  mul.wide.u32 %rd3, %r0, 8;
  add.u64 %rd4, %rd1, %rd3;
  st.global.v2.f32 [%rd4], {%f1, %f5};
  ret;
}
)";
  for (Mode mode : kModes) {
    SCOPED_TRACE(name_of(mode));
    std::vector<std::array<float, 2>> out(128);
    KernelRunner runner(text);
    runner.launch.block = {128, 1, 1};
    runner.options.mode = mode;
    runner.add(out);
    runner.run_ok();
    for (const auto& [own, of_function] : out) {
      ASSERT_EQ(own, 18.0f);
      ASSERT_EQ(of_function, 17.0f);
    }
  }
}

}  // namespace
}  // namespace gpu_emulator
