// A tensor as a tensor map describes it, and whether one can: arithmetic alone, so that a kernel
// that copies by TMA can be chosen or not before anything of CUDA is at hand.
#pragma once

#include <array>
#include <cstdint>

#include "base/dtype.h"
#include "base/nested_strides.h"

namespace flash {

inline constexpr int kMaxMappedRank = 5;

// Dimensions from the innermost out; strides are in elements.
struct StridedView {
  void* address = nullptr;
  Dtype dtype = Dtype::kFloat16;
  int rank = 0;
  std::array<int64_t, kMaxMappedRank> extents{}, strides{};
};

namespace mapped {

inline constexpr int64_t kPieceBytes = 16;  // addresses and strides are multiples of it

inline bool has_legal_stride(const StridedView& x, int dim) {
  constexpr int64_t kEnd = int64_t{1} << 40;  // bytes
  const int64_t bytes = dtype_bytes(x.dtype), stride = x.strides[dim];
  return stride > 0 && stride < kEnd / bytes && stride * bytes % kPieceBytes == 0;
}

}  // namespace mapped

// cuTensorMapEncodeTiled takes `x`, floats of 8 or 16 bits, whatever the box and without
// interleave. The conditions are those of its description in the CUDA driver API, "Tensor Map
// Object Management": the address and the strides beyond the innermost are multiples of 16 bytes,
// the latter below 2^40; extents are from 1 to 2^32. The stride of an extent of 1 is of no
// consequence: torch puts anything there.
//
// Two elements at one address, be it by a stride of 0 (an expanded tensor) or by one smaller than
// what lies below it (sliding windows), are not what that description is of: there each stride is
// made of the extents below it and a padding, and asserted to be no smaller than its extent.
// Drivers may do without that check, but nothing promises it; such tensors are left to kernels
// without tensor maps. That strides ascend is told there too and is no condition here: maps with
// rows inside heads of tensors that have heads inside rows are common (CUTLASS makes them).
inline bool can_map(const StridedView& x) {
  constexpr int64_t kMaxExtent = int64_t{1} << 32;
  if (x.dtype != Dtype::kFloat16 && x.dtype != Dtype::kBFloat16 && x.dtype != Dtype::kFloat8E4M3)
    return false;
  if (x.rank < 1 || x.rank > kMaxMappedRank || x.address == nullptr ||
      reinterpret_cast<uintptr_t>(x.address) % mapped::kPieceBytes != 0)
    return false;
  NestedStrides<kMaxMappedRank> nested;
  for (int i = 0; i < x.rank; ++i) {
    if (x.extents[i] < 1 || x.extents[i] > kMaxExtent) return false;
    if (x.extents[i] == 1) continue;
    if (i == 0 ? x.strides[0] != 1 : !mapped::has_legal_stride(x, i)) return false;
    nested.add(x.strides[i], x.extents[i]);
  }
  return nested.are_nested();
}

}  // namespace flash
