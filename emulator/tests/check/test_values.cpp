// Undefined values on their way through tensor copies.

#include "device/tensor_map.h"
#include "exec/swizzle.h"
#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

constexpr uint32_t kRowBytes = 128, kRows = 16, kBoxBytes = kRowBytes * kRows;

// Rows of 128 bytes, of which the bytes [undefined, undefined + 16) were never written.
struct Tensor {
  std::vector<std::byte> memory;
  TensorMap map;
  std::shared_ptr<DefinedBytes> defined;

  explicit Tensor(uint32_t undefined) : memory(2 * kBoxBytes) {
    map.base = (reinterpret_cast<uint64_t>(memory.data()) + 127) / 128 * 128;
    map.rank = 2;
    map.element = TensorElement::kF16;
    map.swizzle = TensorSwizzle::k128B;
    map.dims[0] = map.box[0] = kRowBytes / 2;
    map.dims[1] = map.box[1] = kRows;
    map.strides[0] = kRowBytes;
    defined = std::make_shared<DefinedBytes>(map.base, kBoxBytes);
    defined->set(map.base, undefined);
    defined->set(map.base + undefined + 16, kBoxBytes - undefined - 16);
  }
};

struct alignas(64) Parameter {
  TensorMap map;
};

// p0: tensor map, p1: output. Copies all words of the box as it lies in shared memory but for those
// at `skipped`.
std::string load_kernel(uint32_t skipped) {
  const std::string bytes = std::to_string(kBoxBytes);
  return kernel(R"(
    mbarrier.init.shared::cta.b64 [%r63], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], )" +
                    bytes + R"(;
    add.u32 %r1, %r63, 1024;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {0, 0}], [%r63];
  WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    @!%p0 bra WAIT;
    mov.u32 %r2, 0;
  COPY:
    sub.u32 %r5, %r2, )" +
                    std::to_string(skipped) + R"(;
    setp.lt.u32 %p2, %r5, 16;
    @%p2 bra NEXT;
    add.u32 %r3, %r1, %r2;
    ld.shared.u32 %r4, [%r3];
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r4;
  NEXT:
    add.u32 %r2, %r2, 4;
    setp.lt.u32 %p1, %r2, )" +
                    bytes + R"(;
    @%p1 bra COPY;
  )",
                2, 4096);
}

Report run(uint32_t undefined, uint32_t skipped, Mode mode) {
  Tensor tensor(undefined);
  std::vector<std::byte> out(kBoxBytes);
  // The map lies in global memory, so that its address can be a 64-bit parameter.
  std::vector<std::byte> parameter(256);
  const uint64_t map = (reinterpret_cast<uint64_t>(parameter.data()) + 63) / 64 * 64;
  std::memcpy(reinterpret_cast<void*>(map), &tensor.map, sizeof(tensor.map));
  KernelRunner runner(load_kernel(skipped));
  runner.argument(map);
  runner.map_memory(map, 128);
  runner.add(out);
  runner.map_memory(tensor.map.base, kBoxBytes, tensor.defined);
  runner.options.mode = mode;
  return runner.run();
}

// The undefined chunk lies where the swizzle puts it, and nowhere else.
TEST(UndefinedTensors, FollowTheSwizzle) {
  constexpr uint32_t kBase = 1024;  // of the box, modulo the swizzle's 1024 bytes
  for (const Mode mode : kModes) {
    for (const uint32_t undefined : {0u, 5 * kRowBytes + 32, kBoxBytes - 16}) {
      SCOPED_TRACE(std::string(name_of(mode)) + ", chunk at " + std::to_string(undefined));
      const uint32_t place = exec::swizzled(kBase + undefined, 128) - kBase;
      EXPECT_EQ(run(undefined, place, mode).text, "");
      const Report report = run(undefined, (place + 16) % kBoxBytes, mode);
      EXPECT_EQ(report.kind, "undefined_store") << report.text;
      EXPECT_NE(report.text.find("cp.async.bulk.tensor"), std::string::npos) << report.text;
    }
  }
}

}  // namespace
}  // namespace gpu_emulator
