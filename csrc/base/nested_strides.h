// Whether the dimensions of a strided view lie inside each other.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <utility>

namespace flash {

template <int kMaxDims>
class NestedStrides {
 public:
  // A dimension; one of extent 1 makes no difference, whatever its stride.
  void add(int64_t stride, int64_t extent) {
    if (extent <= 1) return;
    const std::pair<int64_t, int64_t> dim{stride, extent};
    int at = count_++;
    for (; at > 0 && dims_[at - 1] > dim; --at) dims_[at] = dims_[at - 1];
    dims_[at] = dim;
  }

  // Sorted by stride, each dimension steps over everything that the smaller ones span. Then no two
  // elements are at one address.
  bool are_nested() const {
    int64_t span = 0;
    for (int i = 0; i < count_; ++i) {
      const auto& [stride, extent] = dims_[i];
      if (stride <= span) return false;
      int64_t reach = 0;
      if (__builtin_mul_overflow(stride, extent - 1, &reach) ||
          __builtin_add_overflow(span, reach, &span))
        span = std::numeric_limits<int64_t>::max();
    }
    return true;
  }

 private:
  std::array<std::pair<int64_t, int64_t>, kMaxDims> dims_{};  // stride, extent
  int count_ = 0;
};

}  // namespace flash
