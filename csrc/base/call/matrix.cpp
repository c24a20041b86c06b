#include "base/call/matrix.h"

namespace flash {
namespace {

bool same_view(const Region& x, const Region& y) {
  if (x.t->data != y.t->data || x.t->ndim != y.t->ndim || x.t->dtype != y.t->dtype) return false;
  for (int i = 0; i < x.t->ndim; ++i)
    if (x.size(i) != y.size(i) || (x.size(i) > 1 && x.stride(i) != y.stride(i))) return false;
  return true;
}

}  // namespace

Matrix check_matrix(const Arg& x) {
  check_last_stride(x, "matrices must have contiguous rows");
  return {x.t->data, x.size(0) > 1 ? x.stride(0) : 0};
}

Matrix check_matrix_like(const Arg& x, const Arg& like) {
  require(x.given(), x.name, " must be given");
  check_device(x, like);
  check_dtype_of_q(x, like, "all tensors must have one dtype");
  check_shape(x, {{"rows", like.size(0)}, {"cols", like.size(1)}});
  return check_matrix(x);
}

Matrix check_vector_like(const Arg& x, const Arg& like) {
  check_device(x, like);
  check_dtype_of_q(x, like, "all tensors must have one dtype");
  check_shape(x, {{"cols", like.size(1)}});
  require(is_contiguous(x), x.name, " must be contiguous");
  return {x.t->data, 0};
}

void check_written(std::span<const Region> outputs, std::span<const Region> inputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Region& out = outputs[i];
    if (!out.given()) continue;
    check_no_self_overlap(out);
    for (const Region& other : outputs.subspan(i + 1))
      require(!other.given() || !share_memory(out, other), out.name, " and ", other.name,
              " must not share memory");
    for (const Region& in : inputs)
      require(!in.given() || !share_memory(out, in) || same_view(out, in), out.name, " and ",
              in.name, " must not share memory, or be the same view");
  }
}

}  // namespace flash
