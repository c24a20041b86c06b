// What argument checks are made of: named views of the caller's tensors.
#pragma once

#include <initializer_list>
#include <span>

#include "base/dtype.h"
#include "base/error.h"

namespace flash {

// A tensor argument and its name in error sentences.
struct Arg {
  const char* name;
  const flash_attn_tensor* t;

  bool given() const { return t != nullptr; }
  int64_t size(int i) const { return t->shape[i]; }
  int64_t stride(int i) const { return t->stride[i]; }
  bool empty() const;
};

// A dimension as error sentences name it, and the extent it must have.
struct Dim {
  const char* name;
  int64_t size;
};

// Given, `ndim` dimensions, extents and strides that are not negative and do not overflow, data
// present and aligned. `shape` names the dimensions in the sentence, for instance "(batch_size,
// num_heads)".
void check_view(const Arg& x, int ndim, const char* shape);
// The extents of a view that has been checked.
void check_extents(const Arg& x, std::initializer_list<Dim> dims);
// Both.
void check_shape(const Arg& x, std::initializer_list<Dim> dims);
// `x` lies on q's device; q itself lies on one that the library knows.
void check_device_of_q(const Arg& q);
void check_device(const Arg& x, const Arg& q);
// Unit stride in the last dimension, as far as it has more than one element.
bool has_contiguous_last_dim(const Arg& x);
bool is_contiguous(const Arg& x);

// A checked tensor, which may be absent, and the bytes from its first to its last: none if it is
// absent or empty.
struct Region : Arg {
  uintptr_t begin = 0, end = 0;

  Region(const Arg& x);  // NOLINT(google-explicit-constructor)
  Region(const char* name, const flash_attn_tensor* t) : Region(Arg{name, t}) {}
};

// x and y have a byte in common. Views that lie between each other's rows, as the parts of a packed
// tensor do, have none.
bool share_memory(const Region& x, const Region& y);
// Two elements of x lie at the same address.
bool overlaps_itself(const Arg& x);
// An output does not.
void check_no_self_overlap(const Arg& x);
// No output shares memory with an input or another output.
void check_distinct(std::span<const Region> outputs, std::span<const Region> inputs);

inline const char* dtype_name(const Arg& x) { return dtype_name(static_cast<Dtype>(x.t->dtype)); }
// x has `dtype`; otherwise it is rejected with `sentence` and x's name and dtype.
void check_dtype(const Arg& x, flash_attn_dtype dtype, const char* sentence);
// x has q's dtype; otherwise it is rejected with `sentence` and both dtypes.
void check_dtype_of_q(const Arg& x, const Arg& q, const char* sentence);
// Unit stride in the last dimension; otherwise x is rejected with `sentence`, its name and stride.
void check_last_stride(const Arg& x, const char* sentence);
// fp16, bf16 or fp32; anything else is rejected with `sentence` and x's name and dtype.
Dtype check_float_dtype(const Arg& x, const char* sentence);
// An int32 index tensor on q's device, contiguous.
void check_int32(const Arg& x, const Arg& q, std::initializer_list<Dim> dims);
// The same with one entry a sequence; null when not given.
const int32_t* check_per_sequence(const Arg& x, const Arg& q, int64_t batch_size);
// A fp32 tensor on q's device: statistics and their gradients.
void check_fp32(const Arg& x, const Arg& q, std::initializer_list<Dim> dims);

}  // namespace flash
