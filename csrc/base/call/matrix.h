// Checks of the fused operators' tensors, which are matrices and vectors like one of them.
#pragma once

#include <algorithm>
#include <span>

#include "base/matrix.h"
#include "base/tensor.h"

namespace flash {

// A view that has been checked to have two dimensions: last stride 1, rows at any distance that is
// not negative.
Matrix check_matrix(const Arg& x);
// A matrix of the shape, dtype and device of `like`.
Matrix check_matrix_like(const Arg& x, const Arg& like);
// A contiguous vector of as many elements as `like` has columns, of its dtype and device; as a
// matrix all of whose rows it is.
Matrix check_vector_like(const Arg& x, const Arg& like);

// No output overlaps itself, another output, or an input; but it may lie exactly where an input of
// its shape does: every element is read before it is written.
void check_written(std::span<const Region> outputs, std::span<const Region> inputs);

}  // namespace flash
