// Which tensors share memory. Tensors are strided views, so that the question is whether a sum of
// steps, each taken a bounded number of times, can reach a given distance.
#include <algorithm>
#include <array>

#include "base/nested_strides.h"
#include "base/tensor.h"

namespace flash {
namespace {

// The sums step_0 i_0 + step_1 i_1 + ... with 0 <= i_k <= count_k.
class StepSums {
 public:
  void add(int64_t step, int64_t count) {
    if (step <= 0 || count <= 0) return;
    int at = size_++;
    for (; at > 0 && terms_[at - 1].step > step; --at) terms_[at] = terms_[at - 1];
    terms_[at] = {step, count, 0};
  }
  // The elements of x, in `unit` bytes: x's own size or a part of it.
  void add_tensor(const Arg& x, int64_t unit) {
    const int64_t units = element_bytes(x.t->dtype) / unit;
    for (int i = 0; i < x.t->ndim; ++i) add(x.stride(i) * units, x.size(i) - 1);
    add(1, units - 1);
  }
  // Exact, unless the search takes longer than views of one tensor ever need: then true.
  bool contains(int64_t target) {
    merge();
    return reaches(0, target);
  }

 private:
  struct Term {
    int64_t step, count;
    int64_t rest;  // the largest sum of the terms behind it
  };
  static constexpr int kMaxTerms = 2 * (FLASH_ATTN_MAX_NDIM + 1);

  // Two terms become one where their sums are one evenly spaced series: rows that follow one
  // another without a gap, and steps that both tensors take. Then the largest step comes first.
  void merge() {
    int last = 0;
    for (int i = 1; i < size_; ++i) {
      Term& small = terms_[last];
      const Term& next = terms_[i];
      const int64_t ratio = next.step / small.step;
      if (next.step % small.step == 0 && ratio <= small.count + 1) {
        small.count += ratio * next.count;
      } else {
        terms_[++last] = next;
      }
    }
    size_ = size_ > 0 ? last + 1 : 0;
    std::reverse(terms_.begin(), terms_.begin() + size_);
    for (int64_t i = size_ - 1, rest = 0; i >= 0; --i) {
      terms_[i].rest = rest;
      rest += terms_[i].step * terms_[i].count;
    }
  }

  // Whether the terms from `first` on have the sum `target`.
  bool reaches(int first, int64_t target) {
    if (target <= 0 || first == size_) return target == 0;
    const Term& term = terms_[first];
    const int64_t most = std::min(term.count, target / term.step);
    const int64_t missing = std::max<int64_t>(target - term.rest, 0);
    for (int64_t i = (missing + term.step - 1) / term.step; i <= most; ++i) {
      if (--tries_left_ < 0 || reaches(first + 1, target - i * term.step)) return true;
    }
    return false;
  }

  std::array<Term, kMaxTerms> terms_;  // by ascending step until merged
  int size_ = 0;
  int tries_left_ = 100000;
};

// x and y have bytes in common, given that their extents do. Element i of x and j of y meet where
// x + i = y + j, or i + (last of y - j) = y - x + last of y.
bool elements_meet(const Region& x, const Region& y) {
  const int64_t unit = std::min(element_bytes(x.t->dtype), element_bytes(y.t->dtype));
  StepSums sums;
  sums.add_tensor(x, unit);
  sums.add_tensor(y, unit);
  return sums.contains(static_cast<int64_t>(y.end - x.begin) / unit - 1);
}

bool is_nested(const Arg& x) {
  NestedStrides<FLASH_ATTN_MAX_NDIM> dims;
  for (int i = 0; i < x.t->ndim; ++i) dims.add(x.stride(i), x.size(i));
  return dims.are_nested();
}

// Two elements that differ by at least one step in `dim`, and anyhow in the other dimensions, lie
// at the same address.
bool meets_itself_along(const Arg& x, int dim) {
  if (x.size(dim) <= 1) return false;
  StepSums sums;
  sums.add(x.stride(dim), x.size(dim) - 2);
  int64_t target = -x.stride(dim);
  for (int i = 0; i < x.t->ndim; ++i) {
    if (i == dim) continue;
    sums.add(x.stride(i), 2 * (x.size(i) - 1));
    target += x.stride(i) * (x.size(i) - 1);
  }
  return sums.contains(target);
}

}  // namespace

bool overlaps_itself(const Arg& x) {
  if (x.empty() || is_nested(x)) return false;
  for (int i = 0; i < x.t->ndim; ++i) {
    if (meets_itself_along(x, i)) return true;
  }
  return false;
}

void check_no_self_overlap(const Arg& x) {
  require(!overlaps_itself(x), x.name, " must not overlap itself: it is written to");
}

Region::Region(const Arg& x) : Arg(x) {
  if (!x.given() || x.empty()) return;
  int64_t last = 0;
  for (int i = 0; i < x.t->ndim; ++i) last += (x.size(i) - 1) * x.stride(i);
  begin = reinterpret_cast<uintptr_t>(x.t->data);
  end = begin + static_cast<uintptr_t>((last + 1) * element_bytes(x.t->dtype));
}

bool share_memory(const Region& x, const Region& y) {
  return x.begin < y.end && y.begin < x.end && elements_meet(x, y);
}

void check_distinct(std::span<const Region> outputs, std::span<const Region> inputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto check = [&out = outputs[i]](const Region& other) {
      require(!share_memory(out, other), out.name, " must not share memory with ", other.name);
    };
    std::for_each(outputs.begin() + i + 1, outputs.end(), check);
    std::for_each(inputs.begin(), inputs.end(), check);
  }
}

}  // namespace flash
