#include "base/tensor.h"

#include <limits>
#include <sstream>

namespace flash {
namespace {

std::string shape_text(const Arg& x) {
  std::ostringstream text;
  text << "(";
  for (int i = 0; i < x.t->ndim; ++i) {
    text << (i > 0 ? ", " : "") << x.size(i);
  }
  text << ")";
  return text.str();
}

[[noreturn, gnu::cold]] void fail_shape(const Arg& x, std::initializer_list<Dim> dims) {
  std::ostringstream names, sizes;
  for (const Dim& dim : dims) {
    const char* comma = &dim == dims.begin() ? "" : ", ";
    names << comma << dim.name;
    sizes << comma << dim.size;
  }
  fail(x.name, " must have shape (", names.str(), ") = (", sizes.str(), "), got ", shape_text(x));
}

[[noreturn, gnu::cold]] void fail_negative(const Arg& x, int i) {
  require(x.size(i) >= 0, x.name, " has a negative size in dimension ", i, ": ", x.size(i));
  fail(x.name, " has a negative stride in dimension ", i, ": ", x.stride(i));
}

// Extents and strides are not negative and the last element's address is representable. Returns
// whether `x` is empty.
bool check_layout(const Arg& x) {
  int64_t last = 0;
  bool empty = false, overflow = false;
  for (int i = 0; i < x.t->ndim; ++i) {
    if ((x.size(i) | x.stride(i)) < 0) [[unlikely]] {
      fail_negative(x, i);
    }
    int64_t reach = 0;
    overflow |= __builtin_mul_overflow(x.size(i) - 1, x.stride(i), &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
    empty |= x.size(i) == 0;
  }
  if (empty) return true;
  int64_t bytes = 0;
  overflow |= __builtin_add_overflow(last, 1, &last);
  overflow |= __builtin_mul_overflow(last, element_bytes(x.t->dtype), &bytes);
  overflow |= bytes > std::numeric_limits<int64_t>::max() / 2;  // two tensors' reaches add up
  require(!overflow, x.name, " is too large");
  return false;
}

}  // namespace

bool Arg::empty() const {
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] == 0) return true;
  }
  return false;
}

void check_view(const Arg& x, int ndim, const char* shape) {
  require(x.given(), x.name, " must be given");
  require(x.t->ndim == ndim, x.name, " must have shape ", shape, ", got ", x.t->ndim,
          " dimensions");
  if (check_layout(x)) return;
  require(x.t->data != nullptr, x.name, " has no data (NULL)");
  require((reinterpret_cast<uintptr_t>(x.t->data) & (element_bytes(x.t->dtype) - 1)) == 0, x.name,
          " is not aligned to its element size");
}

void check_extents(const Arg& x, std::initializer_list<Dim> dims) {
  bool same = x.t->ndim == static_cast<int>(dims.size());
  int i = 0;
  for (const Dim& dim : dims) {
    same = same && x.size(i) == dim.size;
    ++i;
  }
  if (!same) [[unlikely]] {
    fail_shape(x, dims);
  }
}

void check_shape(const Arg& x, std::initializer_list<Dim> dims) {
  require(x.given(), x.name, " must be given");
  const int ndim = static_cast<int>(dims.size());
  require(x.t->ndim >= 0 && x.t->ndim <= FLASH_ATTN_MAX_NDIM, x.name, " must have ", ndim,
          " dimensions, got ", x.t->ndim);
  check_extents(x, dims);
  check_view(x, ndim, "");
}

void check_device_of_q(const Arg& q) {
  const int type = static_cast<int>(q.t->device_type);
  require(type == FLASH_ATTN_CPU || type == FLASH_ATTN_CUDA, q.name, " must be on CUDA or the CPU");
}

void check_device(const Arg& x, const Arg& q) {
  require(x.given(), x.name, " must be given");
  const bool same_type = x.t->device_type == q.t->device_type;
  require(same_type || q.t->device_type != FLASH_ATTN_CUDA, x.name, " must be on CUDA");
  const bool same =
      same_type && (q.t->device_type == FLASH_ATTN_CPU || x.t->device_id == q.t->device_id);
  require(same, x.name, " must be on the same device as ", q.name);
}

bool has_contiguous_last_dim(const Arg& x) {
  const int last = x.t->ndim - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 || x.empty();
}

void check_last_stride(const Arg& x, const char* sentence) {
  if (has_contiguous_last_dim(x)) return;
  fail(sentence, ": ", x.name, " has stride ", x.stride(x.t->ndim - 1));
}

bool is_contiguous(const Arg& x) {
  int64_t expected = 1;
  for (int i = x.t->ndim - 1; i >= 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != expected) return x.empty();
    expected *= x.size(i);
  }
  return true;
}

void check_dtype(const Arg& x, flash_attn_dtype dtype, const char* sentence) {
  if (x.t->dtype == dtype) return;
  fail(sentence, ": ", x.name, " has ", dtype_name(x));
}

void check_dtype_of_q(const Arg& x, const Arg& q, const char* sentence) {
  if (x.t->dtype == q.t->dtype) return;
  fail(sentence, ": ", q.name, " has ", dtype_name(q), ", ", x.name, " has ", dtype_name(x));
}

Dtype check_float_dtype(const Arg& x, const char* sentence) {
  switch (static_cast<int>(x.t->dtype)) {
    case FLASH_ATTN_FLOAT16:
      return Dtype::kFloat16;
    case FLASH_ATTN_BFLOAT16:
      return Dtype::kBFloat16;
    case FLASH_ATTN_FLOAT32:
      return Dtype::kFloat32;
    default:
      fail(sentence, ": ", x.name, " has ", dtype_name(x));
  }
}

void check_int32(const Arg& x, const Arg& q, std::initializer_list<Dim> dims) {
  require(x.given(), x.name, " must be given");
  if (x.t->dtype != FLASH_ATTN_INT32) fail(x.name, " must have dtype int32, got ", dtype_name(x));
  check_device(x, q);
  check_shape(x, dims);
  require(is_contiguous(x), x.name, " must be contiguous");
}

const int32_t* check_per_sequence(const Arg& x, const Arg& q, int64_t batch_size) {
  if (!x.given()) return nullptr;
  check_int32(x, q, {{"batch_size", batch_size}});
  return static_cast<const int32_t*>(x.t->data);
}

void check_fp32(const Arg& x, const Arg& q, std::initializer_list<Dim> dims) {
  require(x.given(), x.name, " must be given");
  if (x.t->dtype != FLASH_ATTN_FLOAT32) fail(x.name, " must have dtype fp32, got ", dtype_name(x));
  check_device(x, q);
  check_shape(x, dims);
}

}  // namespace flash
