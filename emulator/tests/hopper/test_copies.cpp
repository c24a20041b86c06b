// Tensor copies (TMA) and bulk copies in kernels, in every mode.

#include <cmath>
#include <random>
#include <set>

#include "device/tensor_map.h"
#include "exec/swizzle.h"
#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

constexpr int kSharedBytes = 40960;
constexpr uint32_t kBox = 1024;  // offset of the box in shared memory

// A tensor of `element` type with dims, dense but for 16-byte aligned strides, and a box.
struct Tensor {
  TensorMap map;
  std::vector<std::byte> memory;

  Tensor(TensorElement element, std::vector<uint64_t> dims, std::vector<uint16_t> box,
         TensorSwizzle swizzle = TensorSwizzle::kNone) {
    map.rank = static_cast<uint8_t>(dims.size());
    map.element = element;
    map.swizzle = swizzle;
    uint64_t stride = (dims[0] * element_bytes(element) + 15) / 16 * 16;
    for (size_t i = 0; i < dims.size(); ++i) {
      map.dims[i] = dims[i];
      map.box[i] = box[i];
      if (i) {
        map.strides[i - 1] = stride;
        stride *= dims[i];
      }
    }
    memory.resize(stride + 16);
    std::mt19937 random(3);
    for (auto& byte : memory) byte = static_cast<std::byte>(random() & 0x3f);
    map.base = (reinterpret_cast<uint64_t>(memory.data()) + 15) / 16 * 16;
  }

  std::byte* base() { return reinterpret_cast<std::byte*>(map.base); }

  // Bytes of element e (linear in the box) of the box at `at`; false: outside the tensor.
  bool element(const std::vector<int>& at, uint32_t e, std::byte** address) {
    uint64_t offset = 0;
    for (int i = 0; i < map.rank; ++i) {
      const uint32_t count = box_elements(map, i);
      const int64_t x = at[i] + int64_t{e % count} * (i ? map.element_strides[i] : 1);
      e /= count;
      if (x < 0 || x >= static_cast<int64_t>(map.dims[i])) return false;
      offset += static_cast<uint64_t>(x) *
                (i ? map.strides[i - 1] : static_cast<uint64_t>(element_bytes(map.element)));
    }
    *address = base() + offset;
    return true;
  }

  uint32_t box_elements_total() const {
    return box_bytes(map) / static_cast<uint32_t>(element_bytes(map.element));
  }
};

std::string coordinates(const std::vector<int>& at) {
  std::string text = "{";
  for (size_t i = 0; i < at.size(); ++i) text += (i ? ", " : "") + std::to_string(at[i]);
  return text + "}";
}

// p0: tensor map, p1: output. One thread loads the box and copies it to the output as it lies in
// shared memory.
std::string load_kernel(const std::vector<int>& at, uint32_t bytes) {
  const std::string size = std::to_string(bytes);
  return kernel(R"(
    mbarrier.init.shared::cta.b64 [%r63], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], )" +
                    size + R"(;
    add.u32 %r1, %r63, 1024;
    prefetch.tensormap [%rd0];
    cp.async.bulk.tensor.)" +
                    std::to_string(at.size()) +
                    "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, " +
                    coordinates(at) + R"(], [%r63];
  WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    @!%p0 bra WAIT;
    mov.u32 %r2, 0;
  COPY:
    add.u32 %r3, %r1, %r2;
    ld.shared.u32 %r4, [%r3];
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r4;
    add.u32 %r2, %r2, 4;
    setp.lt.u32 %p1, %r2, )" +
                    size + R"(;
    @%p1 bra COPY;
  )",
                2, kSharedBytes);
}

// Tensor maps are read with an alignment of 64 bytes.
struct Prepared {
  alignas(64) TensorMap map;
};

void check_load(Tensor& tensor, const std::vector<int>& at, Mode mode) {
  const uint32_t bytes = box_bytes(tensor.map);
  std::vector<std::byte> out(bytes);
  Prepared prepared{tensor.map};
  KernelRunner runner(load_kernel(at, bytes));
  runner.options.mode = mode;
  runner.map_memory(reinterpret_cast<uint64_t>(&prepared.map), sizeof(TensorMap));
  runner.argument(reinterpret_cast<uint64_t>(&prepared.map));
  runner.add(out);
  runner.map_memory(reinterpret_cast<uint64_t>(tensor.memory.data()), tensor.memory.size());
  runner.run_ok();
  const int size = element_bytes(tensor.map.element);
  const auto width = static_cast<uint32_t>(swizzle_bytes(tensor.map.swizzle));
  for (uint32_t e = 0; e < tensor.box_elements_total(); ++e) {
    // 1024: the pattern begins at a multiple of 1024 bytes in shared memory.
    const uint32_t place = exec::swizzled(1024 + e * size, width) - 1024;
    std::byte* address = nullptr;
    std::vector<std::byte> expected(size, std::byte{0});
    if (tensor.element(at, e, &address)) {
      std::copy(address, address + size, expected.begin());
    } else if (tensor.map.fill == TensorFill::kNan) {
      std::fill(expected.begin(), expected.end(), std::byte{0xff});
      expected.back() = std::byte{0x7f};
    }
    ASSERT_EQ(std::memcmp(out.data() + place, expected.data(), size), 0)
        << name_of(mode) << " element " << e;
  }
}

TEST(TensorCopies, LoadsOfEveryRankAtTheEdges) {
  for (Mode mode : kModes) {
    Tensor one(TensorElement::kF32, {100}, {64});
    for (int x : {0, 10, -20, 90, 200}) check_load(one, {x}, mode);
    Tensor two(TensorElement::kBf16, {70, 20}, {32, 16});
    for (int x : {0, -3, 60}) {
      for (int y : {0, -5, 10, 30}) check_load(two, {x, y}, mode);
    }
    Tensor three(TensorElement::kU8, {64, 5, 7}, {32, 4, 3});
    check_load(three, {40, -1, 5}, mode);
    Tensor four(TensorElement::kF16, {24, 6, 5, 4}, {16, 3, 2, 2});
    check_load(four, {16, 4, 4, 3}, mode);
    check_load(four, {-8, 0, -1, 1}, mode);
    Tensor five(TensorElement::kU32, {20, 3, 4, 3, 2}, {8, 2, 3, 2, 2});
    check_load(five, {15, 2, 2, -1, 1}, mode);
  }
}

TEST(TensorCopies, LoadsWithSwizzles) {
  for (TensorSwizzle swizzle : {TensorSwizzle::k32B, TensorSwizzle::k64B, TensorSwizzle::k128B}) {
    const auto inner = static_cast<uint16_t>(swizzle_bytes(swizzle) / 2);
    Tensor tensor(TensorElement::kBf16, {100, 90}, {inner, 64}, swizzle);
    for (Mode mode : kModes) {
      check_load(tensor, {0, 0}, mode);
      check_load(tensor, {70, 60}, mode);
    }
  }
}

TEST(TensorCopies, ElementStridesAndNanFill) {
  Tensor tensor(TensorElement::kBf16, {64, 40}, {32, 16});
  tensor.map.element_strides[1] = 3;
  tensor.map.fill = TensorFill::kNan;
  check_load(tensor, {0, 0}, Mode::kEager);
  check_load(tensor, {40, -4}, Mode::kLate);
}

// p0: tensor map, p1: input. Copies the input to shared memory, then stores or reduces the box.
std::string store_kernel(const std::string& opcode, const std::vector<int>& at, uint32_t bytes,
                         const std::string& after) {
  return kernel(R"(
    add.u32 %r1, %r63, 1024;
    mov.u32 %r2, 0;
  COPY:
    add.u32 %r3, %r1, %r2;
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd3, %rd1, %rd2;
    ld.global.u32 %r4, [%rd3];
    st.shared.u32 [%r3], %r4;
    add.u32 %r2, %r2, 4;
    setp.lt.u32 %p1, %r2, )" +
                    std::to_string(bytes) + R"(;
    @%p1 bra COPY;
    fence.proxy.async.shared::cta;
    )" + opcode + " [%rd0, " +
                    coordinates(at) + R"(], [%r1];
    cp.async.bulk.commit_group;
    )" + after,
                2, kSharedBytes);
}

Report run_store(Tensor& tensor, const std::string& opcode, const std::vector<int>& at,
                 std::vector<std::byte>& in, Mode mode, const std::string& after) {
  Prepared prepared{tensor.map};
  KernelRunner runner(store_kernel(opcode, at, static_cast<uint32_t>(in.size()), after));
  runner.options.mode = mode;
  runner.map_memory(reinterpret_cast<uint64_t>(&prepared.map), sizeof(TensorMap));
  runner.argument(reinterpret_cast<uint64_t>(&prepared.map));
  runner.add(in);
  runner.map_memory(reinterpret_cast<uint64_t>(tensor.memory.data()), tensor.memory.size());
  return runner.run();
}

TEST(TensorCopies, StoresSkipWhatIsOutside) {
  for (Mode mode : kModes) {
    for (const std::string after :
         {"cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"}) {
      Tensor tensor(TensorElement::kBf16, {40, 12}, {32, 8}, TensorSwizzle::k64B);
      Tensor before = tensor;
      before.map.base = tensor.map.base - reinterpret_cast<uint64_t>(tensor.memory.data()) +
                        reinterpret_cast<uint64_t>(before.memory.data());
      const std::vector<int> at = {20, 7};
      std::vector<std::byte> in(box_bytes(tensor.map));
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::byte>(0x80 | i % 97);
      const Report report =
          run_store(tensor, "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group", at, in,
                    mode, after);
      ASSERT_EQ(report.text, "");
      std::set<std::byte*> written;
      for (uint32_t e = 0; e < tensor.box_elements_total(); ++e) {
        std::byte* address = nullptr;
        if (!tensor.element(at, e, &address)) continue;
        const uint32_t place = exec::swizzled(1024 + e * 2, 64) - 1024;
        EXPECT_EQ(std::memcmp(address, in.data() + place, 2), 0);
        written.insert({address, address + 1});
      }
      for (size_t i = 0; i < tensor.memory.size(); ++i) {
        if (!written.count(&tensor.memory[i])) {
          ASSERT_EQ(tensor.memory[i], before.memory[i]);
        }
      }
    }
  }
}

TEST(TensorCopies, Reduces) {
  for (Mode mode : kModes) {
    Tensor tensor(TensorElement::kF32, {16, 4}, {16, 4});
    std::vector<float> start(64);
    std::vector<std::byte> in(256);
    for (int i = 0; i < 64; ++i) {
      start[i] = static_cast<float>(i);
      const float x = 0.5f * static_cast<float>(i);
      std::memcpy(in.data() + 4 * i, &x, 4);
    }
    std::memcpy(tensor.base(), start.data(), 256);
    const Report report =
        run_store(tensor, "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group",
                  {0, 0}, in, mode, "cp.async.bulk.wait_group 0;");
    ASSERT_EQ(report.text, "");
    for (int i = 0; i < 64; ++i) {
      float got;
      std::memcpy(&got, tensor.base() + 4 * i, 4);
      EXPECT_EQ(got, 1.5f * static_cast<float>(i));
    }
  }
}

TEST(TensorCopies, ExitBeforeTheSourceIsReadIsReported) {
  for (Mode mode : kModes) {
    Tensor tensor(TensorElement::kU32, {16, 4}, {16, 4});
    std::vector<std::byte> in(256);
    const Report report = run_store(tensor, "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group",
                                    {0, 0}, in, mode, "");
    EXPECT_EQ(report.kind, "bulk_wait") << report.text;
  }
}

TEST(TensorCopies, BadMapsAndAddressesAreReported) {
  Tensor tensor(TensorElement::kU32, {16, 4}, {16, 4});
  std::vector<std::byte> in(256);
  tensor.map.magic = 1;
  Report report = run_store(tensor, "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", {0, 0},
                            in, Mode::kEager, "");
  EXPECT_EQ(report.kind, "invalid_operand");
  EXPECT_NE(report.text.find("not a tensor map"), std::string::npos);
  tensor.map.magic = kTensorMapMagic;
  report = run_store(tensor, "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group", {0}, in,
                     Mode::kEager, "");
  EXPECT_NE(report.text.find("1 dimensions"), std::string::npos) << report.text;
  tensor.map.base += 4096 * 16;
  report = run_store(tensor, "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", {0, 0}, in,
                     Mode::kEager, "");
  EXPECT_TRUE(report.kind == "out_of_bounds" || report.kind == "wild_pointer") << report.text;
}

// Late mode: what is read before the wait is poison.
TEST(TensorCopies, AMissingWaitReadsPoison) {
  const std::string body = R"(
    mbarrier.init.shared::cta.b64 [%r63], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], 64;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r63+64], [%rd0], 64, [%r63];
    ld.shared.u32 %r0, [%r63+64];
    st.global.u32 [%rd1], %r0;
  WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    @!%p0 bra WAIT;
    ld.shared.u32 %r0, [%r63+64];
    st.global.u32 [%rd1+4], %r0;
  )";
  struct alignas(16) Quad {
    uint32_t x[4];
  };
  std::vector<Quad> in(4, Quad{{5, 6, 7, 8}});
  std::vector<uint32_t> out(2);
  KernelRunner runner(kernel(body, 2, 256));
  runner.options.mode = Mode::kLate;
  runner.options.checks = exec::Checks::memory();
  runner.add(in);
  runner.add(out);
  runner.run_ok();
  EXPECT_EQ(out[0], ~0u);
  EXPECT_EQ(out[1], 5u);
}

TEST(BulkCopies, GroupsAreWaitedForInOrder) {
  // Two groups; waiting for all but the newest makes the first one's bytes appear in global memory.
  const std::string body = R"(
    st.shared.u32 [%r63], 11;
    st.shared.u32 [%r63+16], 22;
    fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r63], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0+16], [%r63+16], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 1;
    ld.global.u32 %r0, [%rd0];
    ld.global.u32 %r1, [%rd0+16];
    st.global.v2.u32 [%rd1], {%r0, %r1};
    cp.async.bulk.wait_group 0;
  )";
  struct alignas(16) Quad {
    uint32_t x[4];
  };
  for (Mode mode : {Mode::kEager, Mode::kLate}) {
    std::vector<Quad> memory(2, Quad{});
    std::vector<uint64_t> out(1);
    KernelRunner runner(kernel(body, 2, 64));
    runner.options.mode = mode;
    runner.options.checks = exec::Checks::memory();
    runner.add(memory);
    runner.add(out);
    runner.run_ok();
    EXPECT_EQ(memory[0].x[0], 11u);
    EXPECT_EQ(memory[1].x[0], 22u);
    EXPECT_EQ(out[0], (mode == Mode::kLate ? uint64_t{0} : uint64_t{22} << 32) | 11);
  }
}

TEST(BulkCopies, ReducesWithRounding) {
  const std::string body = R"(
    st.shared.v4.u32 [%r63], {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    fence.proxy.async;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%rd0], [%r63], 16;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%rd1], [%r63], 16;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.max.s32 [%rd2], [%r63], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
  )";
  struct alignas(16) Halves {
    uint16_t x[8];
  };
  std::vector<Halves> f16(1, Halves{{0x3c00, 0, 0x4000, 0, 0, 0, 0, 0}});
  std::vector<Halves> bf16 = f16, s32 = f16;
  KernelRunner runner(kernel(body, 3, 64));
  runner.add(f16);
  runner.add(bf16);
  runner.add(s32);
  runner.run_ok();
  EXPECT_EQ(f16[0].x[0], 0x4000);  // 1 + 1
  EXPECT_EQ(f16[0].x[1], 0x3c00);
  EXPECT_EQ(f16[0].x[2], 0x4200);  // 2 + 1
  EXPECT_EQ(s32[0].x[0], 0x3c00);
  EXPECT_EQ(s32[0].x[1], 0x3c00);
}

TEST(BulkCopies, SizesAndAlignmentsAreChecked) {
  for (const std::string instruction :
       {"cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r63], 24;",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r63+8], 16;",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd0+4], [%r63], 16;"}) {
    std::vector<uint64_t> memory(8);
    KernelRunner runner(kernel(instruction, 1, 64));
    runner.add(memory);
    EXPECT_EQ(runner.run().kind, "misaligned") << instruction;
  }
}

// Two CTAs; each loads half of the data into both with a multicast.
TEST(Clusters, MulticastReachesEveryCta) {
  const std::string body = R"(
    mov.u32 %r0, %cluster_ctarank;
    mbarrier.init.shared::cta.b64 [%r63], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], 128;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    shl.b32 %r1, %r0, 6;
    add.u32 %r2, %r63, %r1;
    cvt.u64.u32 %rd2, %r1;
    add.u64 %rd3, %rd0, %rd2;
    mov.u16 %h0, 3;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2+128], [%rd3], 64, [%r63], %h0;
  WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    @!%p0 bra WAIT;
    ld.shared.u32 %r3, [%r63+128];
    ld.shared.u32 %r4, [%r63+192];
    shl.b32 %r5, %r0, 3;
    cvt.u64.u32 %rd4, %r5;
    add.u64 %rd5, %rd1, %rd4;
    st.global.v2.u32 [%rd5], {%r3, %r4};
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
  )";
  struct alignas(16) Line {
    uint32_t x[16];
  };
  for (Mode mode : kModes) {
    std::vector<Line> in(2);
    in[0].x[0] = 71;
    in[1].x[0] = 72;
    std::vector<uint64_t> out(2);
    KernelRunner runner(kernel(body, 2, 512));
    runner.launch.grid = runner.launch.cluster = {2, 1, 1};
    runner.options.mode = mode;
    runner.add(in);
    runner.add(out);
    runner.run_ok();
    EXPECT_EQ(out[0], uint64_t{72} << 32 | 71) << name_of(mode);
    EXPECT_EQ(out[1], out[0]);
  }
}

}  // namespace
}  // namespace gpu_emulator
