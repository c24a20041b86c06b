// CUDA tensors, the driver replaced by one that remembers its calls (fake_driver/).
#if defined(FLASH_ATTN_HAVE_CUDA)
#include <cstdlib>

#include "api/select_kernel.h"
#include "api_calls.h"
#include "base/cuda_driver/emulated.h"
#include "base/index_tensors.h"

namespace flash_test {
namespace {

// Before anything of the library asks for the driver.
const bool fake_is_chosen = setenv("FLASH_ATTENTION_CUDA_DRIVER", FLASH_FAKE_DRIVER, 1) == 0;

template <typename Function>
Function fake(const char* name) {
  return reinterpret_cast<Function>(flash::cuda::Driver::machine().symbol(name));
}
void reset(const char* failing = "") { fake<void (*)(const char*)>("fake_reset")(failing); }
std::string calls() { return fake<const char* (*)()>("fake_calls")(); }

std::string in_context(const std::string& call) {
  return "cuCtxPushCurrent " + call + " cuCtxPopCurrent ";
}

// A dense fp16 forward, [2, seqlen_q, 4, 40] over [2, seqlen_k, 2, 40], of CUDA tensors that
// nothing reads.
struct CudaForward {
  FwdCall call;
  explicit CudaForward(int64_t seqlen_q = 130, int64_t seqlen_k = 70) {
    call.args = {};
    const auto add = [&](const char* name, flash_attn_dtype dtype,
                         std::initializer_list<int64_t> shape) {
      flash_attn_tensor* t = call.add(name, dtype, shape);
      t->device_type = FLASH_ATTN_CUDA;
      t->data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t->data) / 16 * 16 + 16);
      return t;
    };
    call.args.q = add("q", FLASH_ATTN_FLOAT16, {2, seqlen_q, 4, 40});
    call.args.k = add("k", FLASH_ATTN_FLOAT16, {2, seqlen_k, 2, 40});
    call.args.v = add("v", FLASH_ATTN_FLOAT16, {2, seqlen_k, 2, 40});
    call.args.out = add("out", FLASH_ATTN_FLOAT16, {2, seqlen_q, 4, 40});
    call.args.softmax_lse = add("softmax_lse", FLASH_ATTN_FLOAT32, {2, 4, seqlen_q});
    call.args.score.softmax_scale = 1;
    call.args.score.window_left = call.args.score.window_right = -1;
  }
  flash_attn_status run() { return flash_attn_mha_fwd(&call.args); }
  void move_to(int device) {
    for (const char* name : {"q", "k", "v", "out", "softmax_lse"}) call[name].device_id = device;
  }
};

TEST(CudaDriver, LaunchesOnTheCallersStreamAndDoesNothingElse) {
  ASSERT_TRUE(fake_is_chosen);
  CudaForward c;
  c.call.args.stream = reinterpret_cast<void*>(0x5000);
  ASSERT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  reset();
  ASSERT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(calls(), in_context("cuLaunchKernel"));
  EXPECT_EQ(fake<void* (*)()>("fake_last_stream")(), c.call.args.stream);
  const unsigned* shape = fake<const unsigned* (*)()>("fake_last_shape")();
  EXPECT_EQ(shape[0], 2u * 4 * 2);  // batch, heads, blocks of 128 queries
  EXPECT_EQ(shape[1], 128u);
  // Q and a ring of three blocks, rows of 128 bytes; what the CTA's sequence is.
  EXPECT_EQ(shape[2], (128u + 3 * 128 + 1) * 128);
}

TEST(CudaDriver, LoadsAKernelAtItsFirstLaunchWhileStreamsMayBeCaptured) {
  CudaForward c;
  c.call.args.score.is_causal = 1;
  for (const char* name : {"q", "k", "v", "out"}) c.call[name].dtype = FLASH_ATTN_BFLOAT16;
  reset();
  ASSERT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_NE(calls().find("cuThreadExchangeStreamCaptureMode cuModuleLoadData cuModuleGetFunction "
                         "cuFuncSetAttribute cuThreadExchangeStreamCaptureMode cuLaunchKernel "),
            std::string::npos)
      << calls();
}

TEST(CudaDriver, ErrorsNameCallErrorAndKernel) {
  CudaForward c;
  ASSERT_EQ(c.run(), FLASH_ATTN_OK);
  reset("cuLaunchKernel");
  EXPECT_EQ(c.run(), FLASH_ATTN_DEVICE_ERROR);
  EXPECT_STREQ(flash_attn_last_error(),
               "cuLaunchKernel failed for kernel flash_fwd_sm80_fp16_d64_unmasked: "
               "CUDA_ERROR_ILLEGAL_ADDRESS (700, an error of the fake driver)");
  EXPECT_EQ(fake<int (*)()>("fake_contexts")(), 0);
  reset();
}

TEST(CudaDriver, ElementsOutOfRangeAreTheNextCallsError) {
  CudaForward c;
  ASSERT_EQ(c.run(), FLASH_ATTN_OK);
  uint32_t* faults = flash::cuda::Device::get(flash::cuda::Driver::machine(), 0).mailbox();
  for (const auto tensor : {flash::IndexTensor::kBlockTable, flash::IndexTensor::kSequsedK})
    faults[static_cast<int>(tensor)] = 1;
  reset();
  EXPECT_EQ(c.run(), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_attn_last_error(),
               "an earlier call on CUDA device 0 was given values out of range in seqused_k, "
               "block_table: what they do not name was left out");
  EXPECT_EQ(calls(), "");
  EXPECT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
}

TEST(CudaDriver, OldAndMissingDevicesAreTurnedDown) {
  CudaForward c;
  c.move_to(1);
  EXPECT_EQ(c.run(), FLASH_ATTN_UNSUPPORTED);
  EXPECT_STREQ(flash_attn_last_error(),
               "CUDA kernels need compute capability 8.0 or newer: device 1 has 7.5");
  c.move_to(2);
  EXPECT_EQ(c.run(), FLASH_ATTN_DEVICE_ERROR);
  EXPECT_NE(std::string(flash_attn_last_error()).find("there is no CUDA device 2"),
            std::string::npos);
}

// 4 tiles of 8 units where 216 CTAs run at a time: one CTA a unit, and a workspace for the results.
TEST(CudaDriver, DecodingClearsItsCountersAndLaunchesOnce) {
  CudaForward c(1, 1024);
  size_t bytes = 0;
  ASSERT_EQ(flash_attn_mha_fwd_workspace_size(&c.call.args, &bytes), FLASH_ATTN_OK);
  const size_t tiles = 2 * 2, rows = 2, units = 8;
  EXPECT_EQ(bytes, tiles * units * rows * (64 + 2) * sizeof(float) + tiles * sizeof(uint32_t));
  EXPECT_EQ(c.run(), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_attn_last_error()).find("workspace must have"), std::string::npos);
  std::vector<char> workspace(bytes);
  c.call.args.workspace = workspace.data();
  c.call.args.workspace_bytes = bytes;
  ASSERT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  reset();
  ASSERT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(calls(), in_context("cuMemsetD32Async") + in_context("cuLaunchKernel"));
  EXPECT_EQ(fake<const unsigned* (*)()>("fake_last_shape")()[0], tiles * units);
}

TEST(CudaDriver, RowsMayStartAnywhereAndHaveAnyHeadDim) {
  CudaForward shifted;
  shifted.call["k"].data = static_cast<char*>(shifted.call["k"].data) + 2;
  EXPECT_EQ(shifted.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  CudaForward narrow;
  for (const char* name : {"v", "out"}) narrow.call[name].shape[3] = 37;
  EXPECT_EQ(narrow.run(), FLASH_ATTN_OK) << flash_attn_last_error();
}

TEST(CudaDriver, EmptyBatchesOfQueriesLaunchNothing) {
  ASSERT_EQ(CudaForward().run(), FLASH_ATTN_OK) << flash_attn_last_error();
  CudaForward c;
  c.call["q"].shape[1] = c.call["out"].shape[1] = c.call["softmax_lse"].shape[2] = 0;
  reset();
  EXPECT_EQ(c.run(), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(calls(), "");
}

TEST(CudaDriver, LibrariesThatCannotBeLoadedAreNamed) {
  EXPECT_EQ(flash_attn_use_emulator("sm_80", "/nowhere/libgpu.so"), FLASH_ATTN_DEVICE_ERROR);
  const std::string sentence = flash_attn_last_error();
  EXPECT_TRUE(sentence.starts_with("the emulated GPU's library, libgpu_emulator.so, cannot be "))
      << sentence;
  EXPECT_NE(sentence.find("/nowhere/libgpu.so"), std::string::npos);
  EXPECT_STREQ(flash_attn_emulator_counters(), "");
}

// Views of one tensor overlap; memory may be registered once.
TEST(EmulatedCall, RegistersOverlappingTensorsOnce) {
  flash::cuda::Device& device = flash::cuda::Device::get(flash::cuda::Driver::machine(), 0);
  char memory[100] = {};
  reset();
  {
    flash::cuda::EmulatedCall call(device, {{memory + 10, memory + 30},
                                            {memory, memory + 20},
                                            {memory + 60, memory + 70},
                                            {memory + 40, memory + 40}});
    EXPECT_EQ(calls(), in_context("cuMemHostRegister") + in_context("cuMemHostRegister"));
    reset();
    call.run([] {});
    EXPECT_EQ(calls(), in_context("cuStreamSynchronize"));
    reset();
  }
  EXPECT_EQ(calls(), in_context("cuMemHostUnregister") + in_context("cuMemHostUnregister"));
}

TEST(SelectKernel, CudaBackendNamesEverythingItLacks) {
  const auto sentence = [](const flash::KernelRequest& request) -> std::string {
    try {
      flash::select_kernel(request);
    } catch (const flash::ApiError& error) {
      EXPECT_EQ(error.status(), FLASH_ATTN_UNSUPPORTED);
      return error.what();
    }
    return "served";
  };
  using flash::Dtype;
  using flash::Operation;
  const flash::Target ampere{.device_type = FLASH_ATTN_CUDA, .compute_capability = 80};
  const flash::Target hopper{.device_type = FLASH_ATTN_CUDA, .compute_capability = 90};
  constexpr uint32_t kWideFeatures = flash::kAllFeatures & ~flash::kFp8Features;
  const flash::Target turing{.device_type = FLASH_ATTN_CUDA, .compute_capability = 75};
  EXPECT_EQ(sentence({Operation::kMhaFwd, ampere, Dtype::kBFloat16, 128, 64}), "served");
  EXPECT_EQ(sentence({Operation::kMhaVarlenFwd, ampere, Dtype::kBFloat16, 256, 256, kWideFeatures}),
            "served");
  EXPECT_EQ(sentence({Operation::kMhaFwd, hopper, Dtype::kFloat16, 64, 128}), "served");
  EXPECT_EQ(
      sentence({Operation::kMhaFwdKvcache, ampere, Dtype::kBFloat16, 576, 512, kWideFeatures}),
      "served");
  EXPECT_EQ(sentence({Operation::kMhaFwd, turing, Dtype::kFloat32, 64, 64}),
            "CUDA kernels need compute capability 8.0 or newer: device 0 has 7.5");
  EXPECT_EQ(sentence({Operation::kMhaFwd, ampere, Dtype::kFloat32, 520, 520}),
            "the CUDA backend lacks fp32, head dimension of v 520 (at most 512) (in mha_fwd); CPU "
            "tensors have it");
  EXPECT_EQ(sentence({Operation::kMhaFwd, ampere, Dtype::kFloat8E4M3, 64, 576}),
            "the CUDA backend lacks fp8, head dimension of v 576 (at most 512) (in mha_fwd); CPU "
            "tensors have it");
  EXPECT_EQ(sentence({Operation::kMhaBwd, ampere, Dtype::kFloat16, 256, 64, kWideFeatures}),
            "served");
  EXPECT_EQ(sentence({Operation::kMhaVarlenBwd, hopper, Dtype::kFloat32, 264, 264}),
            "the CUDA backend lacks fp32, head dimension 264 (at most 256) (in mha_varlen_bwd); "
            "CPU tensors have it");
}

}  // namespace
}  // namespace flash_test
#endif  // FLASH_ATTN_HAVE_CUDA
