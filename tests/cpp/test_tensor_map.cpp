// Tensor maps, encoded by a driver that remembers its calls (fake_driver/) and by the emulated
// GPU's.
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "base/cuda_driver/tensor_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <thread>

#include "fake_driver/encoded_tiled.h"

namespace flash_test {
namespace {

using flash::Dtype;
using flash::cuda::Device;
using flash::cuda::Driver;
using flash::cuda::TensorBox;

const Driver& fake_driver() { return Driver::load(FLASH_FAKE_DRIVER, "a fake driver"); }
const Device& fake_device(int ordinal = 0) { return Device::get(fake_driver(), ordinal); }

template <typename Function>
Function fake(const char* name) {
  return reinterpret_cast<Function>(fake_driver().symbol(name));
}
void reset(const char* failing = "") { fake<void (*)(const char*)>("fake_reset")(failing); }
std::string calls() { return fake<const char* (*)()>("fake_calls")(); }
const EncodedTiled& last_encoded() {
  return *fake<const EncodedTiled* (*)()>("fake_last_encoded")();
}

constexpr char kOneEncoding[] = "cuCtxPushCurrent cuTensorMapEncodeTiled cuCtxPopCurrent ";

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

// k of a packed [2, 300, 3, 4, 72] projection.
TensorBox packed_k(uintptr_t at) {
  return {.tensor = {address(at), Dtype::kBFloat16, 4, {72, 4, 300, 2}, {1, 72, 864, 259200}},
          .box = {64, 1, 128, 1},
          .swizzle_bytes = 128,
          .name = "k"};
}

// What `map` throws; "" if nothing.
template <typename Map>
std::string sentence_of(const Map& map, flash_attn_status status) {
  try {
    map();
  } catch (const flash::ApiError& error) {
    EXPECT_EQ(error.status(), status) << error.what();
    return error.what();
  }
  return "";
}

TEST(TensorMap, TheDriverGetsBytesInAContext) {
  fake_device();
  reset();
  const CUtensorMap map = tensor_map(fake_device(), packed_k(0x10000));
  EXPECT_EQ(calls(), kOneEncoding);
  EXPECT_EQ(map.opaque[0], 0x10000u);
  const EncodedTiled& got = last_encoded();
  EXPECT_EQ(got.type, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  EXPECT_EQ(got.rank, 4);
  EXPECT_EQ(got.address, address(0x10000));
  const uint64_t extents[] = {72, 4, 300, 2, 0}, strides[] = {144, 1728, 518400, 0};
  EXPECT_TRUE(std::equal(extents, extents + 5, got.extents));
  EXPECT_TRUE(std::equal(strides, strides + 4, got.strides));
  const uint32_t box[] = {64, 1, 128, 1, 0}, ones[] = {1, 1, 1, 1, 0};
  EXPECT_TRUE(std::equal(box, box + 5, got.box));
  EXPECT_TRUE(std::equal(ones, ones + 5, got.element_strides));
  EXPECT_EQ(got.interleave, CU_TENSOR_MAP_INTERLEAVE_NONE);
  EXPECT_EQ(got.swizzle, CU_TENSOR_MAP_SWIZZLE_128B);
  EXPECT_EQ(got.promotion, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  EXPECT_EQ(got.fill, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

TEST(TensorMap, TypesAndSwizzlesAreTheDrivers) {
  const std::pair<int, int> swizzles[] = {{0, CU_TENSOR_MAP_SWIZZLE_NONE},
                                          {32, CU_TENSOR_MAP_SWIZZLE_32B},
                                          {64, CU_TENSOR_MAP_SWIZZLE_64B},
                                          {128, CU_TENSOR_MAP_SWIZZLE_128B}};
  for (const auto& [bytes, expected] : swizzles) {
    TensorBox box = packed_k(0x20000);
    box.tensor.dtype = Dtype::kFloat16;
    box.swizzle_bytes = bytes;
    tensor_map(fake_device(), box);
    EXPECT_EQ(last_encoded().swizzle, expected);
    EXPECT_EQ(last_encoded().type, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  }
  TensorBox wrong = packed_k(0x20000);
  wrong.swizzle_bytes = 48;
  EXPECT_EQ(sentence_of([&] { tensor_map(fake_device(), wrong); }, FLASH_ATTN_INVALID_ARGUMENT),
            "a tensor map has no swizzle of 48 bytes (of k)");
}

TEST(TensorMap, StridesOfNoConsequenceBecomeLegal) {
  fake_device();
  for (const int64_t junk : {int64_t{0}, int64_t{1}, int64_t{-7}, INT64_MAX, INT64_MIN}) {
    TensorBox box = packed_k(0x30000);
    box.tensor.extents = {36, 1, 300, 1, 0};
    box.tensor.strides = {1, junk, 40, junk, junk};
    reset();
    tensor_map(fake_device(), box);
    const uint64_t strides[] = {80, 80, 80, 0};
    EXPECT_TRUE(std::equal(strides, strides + 4, last_encoded().strides)) << junk;
    EXPECT_EQ(calls(), junk == 0 ? kOneEncoding : "") << junk;
  }
}

TEST(TensorMap, ADescriptionIsEncodedOnce) {
  const TensorBox box = packed_k(0x40000);
  tensor_map(fake_device(), box);
  reset();
  EXPECT_EQ(tensor_map(fake_device(), box).opaque[0], 0x40000u);
  TensorBox same = box;
  same.name = "another name";
  same.tensor.extents[4] = same.tensor.strides[4] = same.box[4] = 9;  // beyond the rank
  tensor_map(fake_device(), same);
  EXPECT_EQ(calls(), "");
}

TEST(TensorMap, EveryOtherDescriptionIsEncoded) {
  using Change = void (*)(TensorBox&);
  const Change changes[] = {
      [](TensorBox& b) { b.tensor.address = address(0x50010); },
      [](TensorBox& b) { b.tensor.dtype = Dtype::kFloat16; },
      [](TensorBox& b) { b.tensor.rank = 3; },
      [](TensorBox& b) { b.tensor.extents[0] = 64; },
      [](TensorBox& b) { b.tensor.extents[3] = 3; },
      [](TensorBox& b) { b.tensor.strides[1] = 80; },
      [](TensorBox& b) { b.tensor.strides[3] = 259208; },
      [](TensorBox& b) { b.box[0] = 32; },
      [](TensorBox& b) { b.box[3] = 2; },
      [](TensorBox& b) { b.swizzle_bytes = 0; },
  };
  for (const Change change : changes) {
    TensorBox box = packed_k(0x50000);
    tensor_map(fake_device(), box);
    change(box);
    reset();
    tensor_map(fake_device(), box);
    EXPECT_EQ(calls(), kOneEncoding) << "change " << &change - changes;
  }
  fake_device(1);
  reset();
  tensor_map(fake_device(1), packed_k(0x50000));
  EXPECT_EQ(calls(), kOneEncoding);
}

// Far more descriptions than are kept: those that meet in one place do not pass for each other.
TEST(TensorMap, DescriptionsThatCollideStayApart) {
  for (int round = 0; round < 2; ++round) {
    for (uintptr_t i = 1; i <= 2000; ++i) {
      TensorBox box = packed_k(i * 4096);
      box.box[0] = i % 2 == 0 ? 64 : 32;
      const CUtensorMap map = tensor_map(fake_device(), box);
      ASSERT_EQ(map.opaque[0], i * 4096);
      ASSERT_EQ(map.opaque[1], i % 2 == 0 ? 64u : 32u);
    }
  }
}

// The tensors of a middle-sized model's layers come back step by step.
TEST(TensorMap, MostOfAStepIsKept) {
  const auto step = [] {
    reset();
    for (uintptr_t i = 1; i <= 48; ++i)
      tensor_map(fake_device(), packed_k(0x7f0000000000 + i * 614400));
    return static_cast<int>(calls().size() / (sizeof(kOneEncoding) - 1));
  };
  EXPECT_GT(step(), 40);
  EXPECT_LT(step(), 24);  // a place for each of 128: of 48 about 14 meet another
}

TEST(TensorMap, EachThreadHasItsOwn) {
  const TensorBox box = packed_k(0x60000);
  tensor_map(fake_device(), box);
  reset();
  uint64_t seen = 0;
  std::thread([&] { seen = tensor_map(fake_device(), box).opaque[0]; }).join();
  EXPECT_EQ(seen, 0x60000u);
  EXPECT_EQ(calls(), kOneEncoding);
}

TEST(TensorMap, RefusalsNameTheTensorAndAreNotKept) {
  const TensorBox box = packed_k(0x70000);
  fake_device();
  for (int i = 0; i < 2; ++i) {
    reset("cuTensorMapEncodeTiled");
    EXPECT_EQ(sentence_of([&] { tensor_map(fake_device(), box); }, FLASH_ATTN_DEVICE_ERROR),
              "cuTensorMapEncodeTiled failed for the tensor map of k (bf16 at 0x70000, extents 72 "
              "4 300 2, strides 1 72 864 259200, box 64 1 128 1, swizzle of 128 bytes): "
              "CUDA_ERROR_ILLEGAL_ADDRESS (700, an error of the fake driver)");
    EXPECT_EQ(calls(), kOneEncoding);
    EXPECT_EQ(fake<int (*)()>("fake_contexts")(), 0);
  }
  reset();
  EXPECT_EQ(tensor_map(fake_device(), box).opaque[0], 0x70000u);
}

TEST(TensorMap, TensorsThatCannotBeMappedAreNamed) {
  fake_device();
  reset();
  TensorBox box = packed_k(0x80008);
  EXPECT_EQ(sentence_of([&] { tensor_map(fake_device(), box); }, FLASH_ATTN_INVALID_ARGUMENT),
            "k cannot be described by a tensor map: bf16 at 0x80008, extents 72 4 300 2, strides 1 "
            "72 864 259200");
  box = packed_k(0x80000);
  box.tensor.rank = 6;
  EXPECT_NE(sentence_of([&] { tensor_map(fake_device(), box); }, FLASH_ATTN_INVALID_ARGUMENT), "");
  EXPECT_EQ(calls(), "");
}

TEST(TensorMap, OldDriversDoEverythingElse) {
  const Driver& old = Driver::load(FLASH_FAKE_OLD_DRIVER, "an old driver");
  EXPECT_EQ(old->tensor_map_encode_tiled, nullptr);
  Device& device = Device::get(old, 0);
  uint32_t word;
  EXPECT_NO_THROW(device.clear(&word, 1, nullptr));
  EXPECT_EQ(sentence_of([&] { tensor_map(device, packed_k(0x90000)); }, FLASH_ATTN_DEVICE_ERROR),
            std::string(FLASH_FAKE_OLD_DRIVER) +
                " has no function cuTensorMapEncodeTiled: a tensor map of k needs a driver of CUDA "
                "12.0 or newer");
}

#if defined(FLASH_EMULATOR)

Device& emulated(int ordinal) {
  return Device::get(Driver::load(FLASH_EMULATOR, "the emulated GPU"), ordinal);
}

TEST(TensorMap, TheEmulatedDriverTakesWhatCanBeMapped) {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  int taken = 0;
  for (int i = 0; i < 3000; ++i) {
    TensorBox box = packed_k(0x100000 + 16 * (random() % 64));
    flash::StridedView& x = box.tensor;
    x.rank = 1 + static_cast<int>(random() % 5);
    x.extents[0] = pick({1, 36, 64, 72, 256});
    for (int dim = 1; dim < x.rank; ++dim) {
      x.extents[dim] = pick({1, 1, 2, 5, 300, 1 << 20, int64_t{1} << 32});
      x.strides[dim] = pick({0, 8, 40, 64, 72, 256, 512, 5 * 256, 1 << 20, int64_t{1} << 38,
                             (int64_t{1} << 39) - 8, int64_t{1} << 39});
    }
    box.box = {64, 1, 2, 1, 1};
    if (!can_map(x)) continue;
    ASSERT_NO_THROW(tensor_map(emulated(1), box));
    ++taken;
  }
  EXPECT_GT(taken, 300);
}

TEST(TensorMap, TheEmulatedDriversRefusalsAreTold) {
  TensorBox box = packed_k(0x100000);
  box.box[0] = 72;
  EXPECT_NE(sentence_of([&] { tensor_map(emulated(1), box); }, FLASH_ATTN_DEVICE_ERROR)
                .find("cuTensorMapEncodeTiled failed for the tensor map of k (bf16 at 0x100000, "),
            std::string::npos);
  box.box[0] = 64;
  EXPECT_NE(sentence_of([&] { tensor_map(emulated(0), box); }, FLASH_ATTN_DEVICE_ERROR)
                .find("CUDA_ERROR_NOT_SUPPORTED"),
            std::string::npos);
}

#endif  // FLASH_EMULATOR

}  // namespace
}  // namespace flash_test
#endif  // FLASH_ATTN_HAVE_CUDA
