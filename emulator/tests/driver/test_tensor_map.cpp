#include <bit>
#include <functional>

#include "device/tensor_map.h"
#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

// The arguments of cuTensorMapEncodeTiled, valid as they stand: a bf16 matrix of 100 rows of 256.
struct Arguments {
  alignas(64) CUtensorMap map = {};
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint32_t rank = 2;
  uint64_t address = 0x10000;
  cuuint64_t dims[5] = {256, 100, 1, 1, 1};
  cuuint64_t strides[4] = {512, 51200, 51200, 51200};
  cuuint32_t box[5] = {64, 128, 1, 1, 1};
  cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMapInterleave interleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  CUtensorMapFloatOOBfill fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;

  CUresult encode(CUtensorMap* out) {
    return cuTensorMapEncodeTiled(out, type, rank, reinterpret_cast<void*>(address), dims, strides,
                                  box, element_strides, interleave, swizzle, promotion, fill);
  }
  CUresult encode() { return encode(&map); }
};

using DriverTensorMap = HopperDriverTest;

TEST_F(DriverTensorMap, EncodesAllFields) {
  Arguments arguments;
  ASSERT_CU(CUDA_SUCCESS, arguments.encode()) << report();
  const auto map = std::bit_cast<TensorMap>(arguments.map);
  EXPECT_EQ(map.base, 0x10000u);
  EXPECT_EQ(map.rank, 2);
  EXPECT_EQ(map.dims[0], 256u);
  EXPECT_EQ(map.strides[0], 512u);
  EXPECT_EQ(map.box[1], 128u);
  EXPECT_EQ(map.element, TensorElement::kBf16);
  EXPECT_EQ(map.swizzle, TensorSwizzle::k128B);
  EXPECT_EQ(tensor_map_error(map), "");
}

TEST_F(DriverTensorMap, EachRuleIsChecked) {
  const std::function<void(Arguments&)> breaks[] = {
      [](Arguments& a) { a.rank = 0; },
      [](Arguments& a) { a.rank = 6; },
      [](Arguments& a) { a.type = static_cast<CUtensorMapDataType>(99); },
      [](Arguments& a) { a.type = static_cast<CUtensorMapDataType>(256 + 9); },
      [](Arguments& a) { a.address = 0; },
      [](Arguments& a) { a.address = 0x10008; },
      [](Arguments& a) { a.dims[0] = 0; },
      [](Arguments& a) { a.dims[1] = (uint64_t{1} << 32) + 1; },
      [](Arguments& a) { a.strides[0] = 520; },
      [](Arguments& a) { a.strides[0] = uint64_t{1} << 40; },
      [](Arguments& a) { a.box[0] = 0; },
      [](Arguments& a) { a.box[1] = 257; },
      [](Arguments& a) { a.box[1] = 65536 + 64; },
      [](Arguments& a) { a.box[0] = 4; },
      [](Arguments& a) { a.box[0] = 128; },
      [](Arguments& a) { a.element_strides[1] = 0; },
      [](Arguments& a) { a.element_strides[1] = 9; },
      [](Arguments& a) { a.element_strides[1] = 257; },
      [](Arguments& a) { a.interleave = static_cast<CUtensorMapInterleave>(7); },
      [](Arguments& a) { a.interleave = CU_TENSOR_MAP_INTERLEAVE_32B; },
      [](Arguments& a) { a.swizzle = static_cast<CUtensorMapSwizzle>(-1); },
      [](Arguments& a) { a.promotion = static_cast<CUtensorMapL2promotion>(4); },
      [](Arguments& a) { a.fill = static_cast<CUtensorMapFloatOOBfill>(2); },
      [](Arguments& a) {
        a.type = CU_TENSOR_MAP_DATA_TYPE_UINT16;
        a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
      },
  };
  for (size_t i = 0; i < std::size(breaks); ++i) {
    Arguments arguments;
    breaks[i](arguments);
    EXPECT_CU(CUDA_ERROR_INVALID_VALUE, arguments.encode()) << "rule " << i;
    EXPECT_NE(report(), "") << "rule " << i;
  }
}

TEST_F(DriverTensorMap, LimitsAreAllowed) {
  Arguments arguments;
  arguments.rank = 5;
  arguments.dims[4] = uint64_t{1} << 32;
  arguments.strides[3] = (uint64_t{1} << 40) - 16;
  arguments.box[1] = 256;
  arguments.element_strides[1] = 8;
  arguments.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  EXPECT_CU(CUDA_SUCCESS, arguments.encode()) << report();
}

TEST_F(DriverTensorMap, BadPointers) {
  Arguments a;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, a.encode(nullptr));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, a.encode(reinterpret_cast<CUtensorMap*>(64)));
  auto* odd = reinterpret_cast<CUtensorMap*>(reinterpret_cast<char*>(&a.map) + 16);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, a.encode(odd));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuTensorMapEncodeTiled(&a.map, a.type, 2, reinterpret_cast<void*>(a.address), nullptr,
                                   a.strides, a.box, a.element_strides, a.interleave, a.swizzle,
                                   a.promotion, a.fill));
}

TEST_F(DriverTensorMap, ReplacesTheAddress) {
  Arguments arguments;
  ASSERT_CU(CUDA_SUCCESS, arguments.encode());
  EXPECT_CU(CUDA_SUCCESS,
            cuTensorMapReplaceAddress(&arguments.map, reinterpret_cast<void*>(0x20000)));
  EXPECT_EQ(std::bit_cast<TensorMap>(arguments.map).base, 0x20000u);
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuTensorMapReplaceAddress(&arguments.map, reinterpret_cast<void*>(0x20001)));
  arguments.map = {};
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE,
            cuTensorMapReplaceAddress(&arguments.map, reinterpret_cast<void*>(0x20000)));
}

using DriverTensorMapA100 = DriverTest;

TEST_F(DriverTensorMapA100, NeedsHopper) {
  Arguments arguments;
  EXPECT_CU(CUDA_ERROR_NOT_SUPPORTED, arguments.encode());
}

}  // namespace
}  // namespace gpu_emulator::testing_support
