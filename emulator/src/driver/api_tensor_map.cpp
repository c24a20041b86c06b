// Tensor maps, for the TMA instructions of sm_90.

#include <bit>

#include "arguments.h"
#include "device/tensor_map.h"

using namespace gpu_emulator::driver;

namespace {

using gpu_emulator::TensorMap;

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
static_assert(static_cast<int>(gpu_emulator::TensorElement::kTf32Ftz) ==
              CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ);
static_assert(static_cast<int>(gpu_emulator::TensorElement::kBf16) ==
              CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
static_assert(static_cast<int>(gpu_emulator::TensorSwizzle::k128B) == CU_TENSOR_MAP_SWIZZLE_128B);
static_assert(static_cast<int>(gpu_emulator::TensorInterleave::k32B) ==
              CU_TENSOR_MAP_INTERLEAVE_32B);

struct Arrays {  // of the caller's
  const cuuint64_t *dims, *strides;
  const cuuint32_t *box, *element_strides;
};

// A value in a field of 8 or 16 bits; one that does not fit becomes 0, which no rule allows.
template <typename Field>
Field narrow(uint64_t value) {
  return static_cast<uint64_t>(static_cast<Field>(value)) == value ? static_cast<Field>(value)
                                                                   : Field{0};
}

void fill(TensorMap& map, const Arrays& arrays, cuuint32_t rank) {
  map.rank = static_cast<uint8_t>(rank);
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.dims[i] = take(arrays.dims + i, "globalDim");
    map.box[i] = narrow<uint16_t>(take(arrays.box + i, "boxDim"));
    map.element_strides[i] = narrow<uint8_t>(take(arrays.element_strides + i, "elementStrides"));
    if (i > 0) map.strides[i - 1] = take(arrays.strides + i - 1, "globalStrides");
  }
}

void require_enum(int value, int count, const char* name) {
  if (value >= 0 && value < count) return;
  fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " is none of its enumerators.");
}

void write(CUtensorMap* out, const TensorMap& map) {
  require_pointer(out, "tensorMap");
  require(reinterpret_cast<uint64_t>(out) % 64 == 0, "tensorMap is not aligned to 64 bytes.");
  require(safe_copy(out, &map, sizeof(map)), "tensorMap does not point to writable memory.");
}

void check(const TensorMap& map) {
  const std::string error = tensor_map_error(map);
  if (!error.empty()) fail(CUDA_ERROR_INVALID_VALUE, "Tensor map: " + error);
}

void require_tensor_maps(Driver& state) {
  const auto& arch = *state.current_device().arch;
  if (arch.has_sm90a) return;
  fail(CUDA_ERROR_NOT_SUPPORTED,
       "Tensor maps need compute capability 9.0; the current device is " + arch.name + ".");
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill_value) {
  return guarded([&](Driver& state) {
    require_tensor_maps(state);
    require(rank >= 1 && rank <= gpu_emulator::kMaxTensorRank, "tensorRank must be from 1 to 5.");
    require_enum(type, CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B + 1, "tensorDataType");
    require_enum(interleave, CU_TENSOR_MAP_INTERLEAVE_32B + 1, "interleave");
    require_enum(swizzle, CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B + 1, "swizzle");
    require_enum(promotion, CU_TENSOR_MAP_L2_PROMOTION_L2_256B + 1, "l2Promotion");
    require_enum(fill_value, CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA + 1, "oobFill");
    TensorMap map;
    map.base = reinterpret_cast<uint64_t>(address);
    require(map.base != 0, "globalAddress is a null pointer.");
    map.element = static_cast<gpu_emulator::TensorElement>(type);
    map.interleave = static_cast<gpu_emulator::TensorInterleave>(interleave);
    map.swizzle = static_cast<gpu_emulator::TensorSwizzle>(swizzle);
    map.fill = static_cast<gpu_emulator::TensorFill>(fill_value);
    fill(map, {dims, strides, box, element_strides}, rank);
    check(map);
    write(out, map);
  });
}

CUresult cuTensorMapReplaceAddress(CUtensorMap* out, void* address) {
  return guarded([&](Driver& state) {
    require_tensor_maps(state);
    auto map = std::bit_cast<TensorMap>(take(out, "tensorMap"));
    map.base = reinterpret_cast<uint64_t>(address);
    check(map);
    write(out, map);
  });
}
