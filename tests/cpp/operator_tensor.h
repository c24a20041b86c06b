// What tests of the operators beside attention are made of: tensors for the C interface, in memory
// that shows what is read or written beside their elements, and the instruction sets.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <sstream>

#include "flash_attn/flash_attn.h"
#include "poison_tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace flash_test {

using flash::Dtype;

inline constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};

// Of up to four dimensions. What lies between its rows and around it is NaN.
class OpTensor {
 public:
  OpTensor(Dtype dtype, std::vector<int64_t> shape, int64_t gap = 0)
      : ndim_(static_cast<int>(shape.size())), tensor_(dtype, padded(shape), gap) {
    view_ = {
        tensor_.data(), static_cast<flash_attn_dtype>(dtype), FLASH_ATTN_CPU, 0, ndim_, {}, {}};
    for (int i = 0; i < ndim_; ++i) {
      view_.shape[i] = shape[i];
      view_.stride[i] = tensor_.stride(4 - ndim_ + i);
    }
  }
  OpTensor(const OpTensor&) = delete;  // views point into it
  OpTensor& operator=(const OpTensor&) = delete;

  const flash_attn_tensor* view() const { return &view_; }
  PoisonTensor& tensor() { return tensor_; }
  Dtype dtype() const { return tensor_.dtype(); }

  double get(int64_t i) const { return tensor_.get({0, 0, 0, i}); }
  double get(int64_t row, int64_t i) const { return tensor_.get({0, 0, row, i}); }
  void set(int64_t row, int64_t i, double x) { tensor_.set({0, 0, row, i}, x); }

  OpTensor& fill(const std::function<double()>& f) {
    tensor_.fill(f);
    return *this;
  }

 private:
  static PoisonTensor::Index padded(const std::vector<int64_t>& shape) {
    PoisonTensor::Index index{1, 1, 1, 1};
    std::copy(shape.begin(), shape.end(), index.end() - static_cast<ptrdiff_t>(shape.size()));
    return index;
  }

  int ndim_;
  PoisonTensor tensor_;
  flash_attn_tensor view_;
};

// A contiguous vector of indices.
template <class T>
flash_attn_tensor index_view(std::vector<T>& values) {
  const flash_attn_dtype dtype = sizeof(T) == 4 ? FLASH_ATTN_INT32 : FLASH_ATTN_INT64;
  return {values.data(), dtype, FLASH_ATTN_CPU, 0, 1, {static_cast<int64_t>(values.size())}, {1}};
}

// Random numbers, the same in each run.
class Numbers {
 public:
  explicit Numbers(unsigned seed) : generator_(seed) {}
  double normal() { return std::normal_distribution<double>()(generator_); }
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator_); }
  std::function<double()> normals() {
    return [this] { return normal(); };
  }

 private:
  std::mt19937_64 generator_;
};

// What rounding to a dtype explains of an error: of the value, and of fp32 sums of its `terms`.
inline double rounding(Dtype t, double value, double terms) {
  const double unit = t == Dtype::kFloat32 ? 0x1p-24 : t == Dtype::kFloat16 ? 0x1p-11 : 0x1p-8;
  const double smallest = t == Dtype::kFloat16 ? 0x1p-25 : 0.;  // half a subnormal step
  return unit * std::fabs(value) + smallest + 0x1p-20 * terms;
}

// Every element of `actual` is that of `expected(row, column)` but for rounding; `terms(row,
// column)`: how large the summands are that it is made of. Nothing was written beside it.
inline void expect_elements(const char* name, OpTensor& actual,
                            const std::function<double(int64_t, int64_t)>& expected,
                            const std::function<double(int64_t, int64_t)>& terms) {
  double worst = 0.;
  std::ostringstream where;
  actual.tensor().for_each([&](const PoisonTensor::Index& at) {
    const int64_t i = at[2], j = at[3];
    const double value = actual.tensor().get(at), wanted = expected(i, j);
    const double bound = rounding(actual.dtype(), wanted, terms(i, j));
    const double error = value == wanted ? 0. : std::fabs(value - wanted) / bound;
    if (!(error > worst) && !std::isnan(error)) return;
    worst = std::isnan(error) ? INFINITY : error;
    where.str("");
    where << name << "[" << i << "][" << j << "] is " << value << ", expected " << wanted;
  });
  EXPECT_LE(worst, 1.) << where.str();
  EXPECT_TRUE(actual.tensor().untouched_between_elements()) << name << ": written beside it";
}

// The instruction sets that this machine runs and operators have loops for.
inline std::vector<std::string> operator_isas() {
  std::vector<std::string> found;
  std::istringstream names(flash_attn_cpu_isas());
  for (std::string name; names >> name;)
    if (name == "baseline" || name == "avx2" || name == "avx512" || name == "wide16")
      found.push_back(name);
  return found;
}

// Runs each test of a suite once on each of them.
class OperatorOn : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_EQ(flash_attn_set_cpu_isa(GetParam().c_str()), FLASH_ATTN_OK); }
  void TearDown() override { flash_attn_set_cpu_isa(nullptr); }
};

// Makes addresses that a call must not touch known to the address sanitizer, while it lives.
class Sealed {
 public:
  explicit Sealed(std::initializer_list<OpTensor*> tensors) {
    for (OpTensor* x : tensors)
      if (x != nullptr) seal(*x);
  }
  ~Sealed() {
    for (const auto& [address, bytes] : sealed_) unseal(address, bytes);
  }
  Sealed(const Sealed&) = delete;
  Sealed& operator=(const Sealed&) = delete;

 private:
  void seal([[maybe_unused]] OpTensor& x) {
#if defined(__SANITIZE_ADDRESS__)
    const auto add = [&](const unsigned char* begin, const unsigned char* end) {
      if (begin >= end) return;
      __asan_poison_memory_region(begin, end - begin);
      sealed_.emplace_back(begin, end - begin);
    };
    const auto& bytes = x.tensor().bytes();
    const int size = flash::dtype_bytes(x.dtype());
    const unsigned char* last = bytes.data();
    x.tensor().for_each([&](const PoisonTensor::Index& at) {
      const auto* element = static_cast<const unsigned char*>(x.tensor().address(at));
      add(last, element);
      last = element + size;
    });
    add(last, bytes.data() + bytes.size());
#endif
  }
  static void unseal([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(address, bytes);
#endif
  }

  std::vector<std::pair<const void*, size_t>> sealed_;
};

inline void expect_ok(flash_attn_status status) {
  ASSERT_EQ(status, FLASH_ATTN_OK) << flash_attn_last_error();
}

}  // namespace flash_test
