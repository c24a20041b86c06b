// A strided tensor in memory that is NaN wherever no element has been set: what must not be read
// spoils results, and what must not be written shows.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "float_format.h"

namespace flash_test {

class PoisonTensor {
 public:
  using Index = std::array<int64_t, 4>;

  // `gap` elements lie unused between neighbours in each dimension but the last.
  PoisonTensor(flash::Dtype dtype, Index shape, int64_t gap = 0) : dtype_(dtype), shape_(shape) {
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      stride_[i] = stride;
      stride = stride * shape[i] + gap;
    }
    bytes_.assign((stride + 2 * kGuard) * flash::dtype_bytes(dtype), kPoison);
    is_element_.assign(stride + 2 * kGuard, false);
    for_each([&](const Index& i) { is_element_[offset(i)] = true; });
  }

  flash::Dtype dtype() const { return dtype_; }
  const Index& shape() const { return shape_; }
  int64_t stride(int dim) const { return stride_[dim]; }
  void* data() { return bytes_.data() + kGuard * flash::dtype_bytes(dtype_); }
  float* floats() { return reinterpret_cast<float*>(data()); }
  flash::Operand operand() { return {data(), stride_[0], stride_[1], stride_[2]}; }
  // The same with rows that count from the start of a packed batch.
  flash::Operand packed_operand() { return {data(), 0, stride_[1], stride_[2]}; }

  double get(const Index& i) const {
    uint32_t code = 0;
    const int size = flash::dtype_bytes(dtype_);
    std::memcpy(&code, bytes_.data() + offset(i) * size, size);
    return format_of(dtype_).decode(code);
  }
  // Rounds to the dtype.
  void set(const Index& i, double value) {
    const uint32_t code = format_of(dtype_).encode(value);
    const int size = flash::dtype_bytes(dtype_);
    std::memcpy(bytes_.data() + offset(i) * size, &code, size);
  }
  void add(const Index& i, double value) { set(i, get(i) + value); }
  template <class F>  // F() -> double
  void fill(F f) {
    for_each([&](const Index& i) { set(i, f()); });
  }
  template <class F>  // F(index)
  void for_each(F f) const {
    for (int64_t a = 0; a < shape_[0]; ++a)
      for (int64_t b = 0; b < shape_[1]; ++b)
        for (int64_t c = 0; c < shape_[2]; ++c)
          for (int64_t d = 0; d < shape_[3]; ++d) f(Index{a, b, c, d});
  }

  bool untouched_between_elements() const {
    const int size = flash::dtype_bytes(dtype_);
    for (size_t i = 0; i < bytes_.size(); ++i)
      if (!is_element_[i / size] && bytes_[i] != kPoison) return false;
    return true;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  const void* address(const Index& i) const {
    return bytes_.data() + offset(i) * flash::dtype_bytes(dtype_);
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // all bits set is NaN in each format
  static constexpr int64_t kGuard = 64;           // elements in front and behind

  int64_t offset(const Index& i) const {
    return kGuard + i[0] * stride_[0] + i[1] * stride_[1] + i[2] * stride_[2] + i[3] * stride_[3];
  }

  flash::Dtype dtype_;
  Index shape_, stride_;
  std::vector<unsigned char> bytes_;
  std::vector<bool> is_element_;
};

}  // namespace flash_test
