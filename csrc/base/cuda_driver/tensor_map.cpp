#include "base/cuda_driver/tensor_map.h"

#include <sstream>
#include <vector>

namespace flash::cuda {
namespace {

// What the driver is given, in its terms; equal for descriptions that mean the same.
struct Encoding {
  const Device* device;
  void* address;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  cuuint32_t rank;
  std::array<cuuint64_t, kMaxMappedRank> extents{};
  std::array<cuuint64_t, kMaxMappedRank - 1> strides{};  // bytes, from dimension 1 on
  std::array<cuuint32_t, kMaxMappedRank> box{};

  bool operator==(const Encoding&) const = default;
};

std::string text(const StridedView& x) {
  std::ostringstream words;
  words << dtype_name(x.dtype) << " at " << x.address << ", extents";
  for (int i = 0; i < x.rank && i < kMaxMappedRank; ++i) words << " " << x.extents[i];
  words << ", strides";
  for (int i = 0; i < x.rank && i < kMaxMappedRank; ++i) words << " " << x.strides[i];
  return words.str();
}

CUtensorMapDataType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case Dtype::kFloat8E4M3:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  }
}

CUtensorMapSwizzle swizzle_of(const TensorBox& what) {
  switch (what.swizzle_bytes) {
    case 0:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
  }
  fail("a tensor map has no swizzle of ", what.swizzle_bytes, " bytes (of ", what.name, ")");
}

// Rows without a gap: legal whatever the extents are.
cuuint64_t smallest_stride(const StridedView& x) {
  const int64_t bytes = x.extents[0] * dtype_bytes(x.dtype);
  return static_cast<cuuint64_t>((bytes + mapped::kPieceBytes - 1) / mapped::kPieceBytes *
                                 mapped::kPieceBytes);
}

Encoding encoding_of(const Device& device, const TensorBox& what) {
  const StridedView& x = what.tensor;
  if (!can_map(x)) [[unlikely]] {
    fail(what.name, " cannot be described by a tensor map: ", text(x));
  }
  Encoding result{&device, x.address, type_of(x.dtype), swizzle_of(what),
                  static_cast<cuuint32_t>(x.rank)};
  for (int i = 0; i < x.rank; ++i) {
    result.extents[i] = static_cast<cuuint64_t>(x.extents[i]);
    result.box[i] = static_cast<cuuint32_t>(what.box[i]);
    if (i == 0) continue;
    result.strides[i - 1] = x.extents[i] == 1
                                ? smallest_stride(x)
                                : static_cast<cuuint64_t>(x.strides[i] * dtype_bytes(x.dtype));
  }
  return result;
}

CUtensorMap encode(const Device& device, const Encoding& e, const TensorBox& what) {
  const Driver& driver = device.driver();
  if (driver->tensor_map_encode_tiled == nullptr)
    throw ApiError(FLASH_ATTN_DEVICE_ERROR,
                   driver.library() + " has no function cuTensorMapEncodeTiled: a tensor map of " +
                       what.name + " needs a driver of CUDA 12.0 or newer");
  constexpr std::array<cuuint32_t, kMaxMappedRank> kElementStrides{1, 1, 1, 1, 1};
  const Device::CurrentContext current(device);
  CUtensorMap map;
  const CUresult result = driver->tensor_map_encode_tiled(
      &map, e.type, e.rank, e.address, e.extents.data(), e.strides.data(), e.box.data(),
      kElementStrides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, e.swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) [[unlikely]] {
    std::ostringstream words;
    words << "the tensor map of " << what.name << " (" << text(what.tensor) << ", box";
    for (int i = 0; i < what.tensor.rank; ++i) words << " " << what.box[i];
    words << ", swizzle of " << what.swizzle_bytes << " bytes)";
    driver.check(result, "cuTensorMapEncodeTiled", words.str());
  }
  return map;
}

// Remembers the last encoding of each hash.
class Cache {
 public:
  const CUtensorMap* find(const Encoding& e) const {
    const Entry& entry = entries_[slot(e)];
    return entry.encoding == e ? &entry.map : nullptr;
  }
  void store(const Encoding& e, const CUtensorMap& map) { entries_[slot(e)] = {e, map}; }

 private:
  // q, k, v and out of the layers of a middle-sized model.
  static constexpr int kSlotBits = 7;

  struct Entry {
    Encoding encoding{};  // of no device
    CUtensorMap map;
  };

  static size_t slot(const Encoding& e) {
    uint64_t hash = reinterpret_cast<uintptr_t>(e.device);
    const auto mix = [&](uint64_t word) { hash = (hash ^ word) * 0x9e3779b97f4a7c15; };
    mix(reinterpret_cast<uintptr_t>(e.address));
    mix(uint64_t{e.rank} << 32 | static_cast<uint64_t>(e.type) << 8 |
        static_cast<uint64_t>(e.swizzle));
    for (const cuuint64_t extent : e.extents) mix(extent);
    for (const cuuint64_t stride : e.strides) mix(stride);
    for (const cuuint32_t length : e.box) mix(length);
    return hash >> (64 - kSlotBits);
  }

  std::vector<Entry> entries_ = std::vector<Entry>(size_t{1} << kSlotBits);
};

}  // namespace

CUtensorMap tensor_map(const Device& device, const TensorBox& what) {
  static thread_local Cache cache;
  const Encoding wanted = encoding_of(device, what);
  if (const CUtensorMap* found = cache.find(wanted)) return *found;
  const CUtensorMap map = encode(device, wanted, what);
  cache.store(wanted, map);
  return map;
}

}  // namespace flash::cuda
