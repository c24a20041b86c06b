// Valid calls of the C interface, small enough to break in one line: `call["q"].shape[3] = 0`.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "flash_attn/flash_attn.h"

namespace flash_test {

inline size_t element_bytes(flash_attn_dtype dtype) {
  return dtype == FLASH_ATTN_INT64 ? 8 : dtype <= FLASH_ATTN_BFLOAT16 ? 2 : 4;
}

// A contiguous tensor that owns its memory, kMargin bytes before and after it too: shifted into
// that of another, a small view meets no third one.
struct Buffer {
  static constexpr size_t kMargin = 1 << 14;
  std::vector<unsigned char> bytes;
  flash_attn_tensor view;

  Buffer(flash_attn_dtype dtype, std::initializer_list<int64_t> shape, unsigned char fill) {
    view = {};
    view.dtype = dtype;
    view.device_type = FLASH_ATTN_CPU;
    view.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    int64_t numel = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
      view.stride[i] = numel;
      numel *= view.shape[i];
    }
    bytes.assign(numel * element_bytes(dtype) + 2 * kMargin, fill);
    view.data = bytes.data() + kMargin;
  }
};

// The arguments of one entry point with the tensors they point to.
template <typename Args>
class Call {
 public:
  Args args{};

  flash_attn_tensor* add(const std::string& name, flash_attn_dtype dtype,
                         std::initializer_list<int64_t> shape) {
    return &tensors_.emplace(name, Buffer(dtype, shape, 0)).first->second.view;
  }
  // An output, or a cache: compared byte by byte after a rejected call.
  flash_attn_tensor* add_guarded(const std::string& name, flash_attn_dtype dtype,
                                 std::initializer_list<int64_t> shape) {
    guarded_.push_back(name);
    return &tensors_.emplace(name, Buffer(dtype, shape, kGuard)).first->second.view;
  }
  flash_attn_tensor* add_int32(const std::string& name, const std::vector<int32_t>& values) {
    flash_attn_tensor* t = add(name, FLASH_ATTN_INT32, {static_cast<int64_t>(values.size())});
    if (!values.empty()) std::memcpy(t->data, values.data(), values.size() * sizeof(int32_t));
    return t;
  }
  flash_attn_tensor& operator[](const std::string& name) { return tensors_.at(name).view; }
  int32_t& int32(const std::string& name, int i) {
    return reinterpret_cast<int32_t*>(tensors_.at(name).bytes.data() + Buffer::kMargin)[i];
  }
  bool outputs_untouched() const {
    for (const std::string& name : guarded_) {
      for (unsigned char byte : tensors_.at(name).bytes) {
        if (byte != kGuard) return false;
      }
    }
    return true;
  }

 private:
  static constexpr unsigned char kGuard = 0x5a;
  std::map<std::string, Buffer> tensors_;
  std::vector<std::string> guarded_;
};

using FwdCall = Call<flash_attn_fwd_args>;
using BwdCall = Call<flash_attn_bwd_args>;
using KvcacheCall = Call<flash_attn_kvcache_args>;
using CombineCall = Call<flash_attn_combine_args>;

// One way to break a call, and what its sentence must contain.
template <typename C>
struct Broken {
  const char* sentence;
  void (*breakage)(C&);
};

template <typename C, typename Run>
void expect_rejected(C (*make)(), Run run, const std::vector<Broken<C>>& cases) {
  for (const Broken<C>& broken : cases) {
    C call = make();
    broken.breakage(call);
    EXPECT_EQ(run(&call.args), FLASH_ATTN_INVALID_ARGUMENT) << broken.sentence;
    EXPECT_NE(std::string(flash_attn_last_error()).find(broken.sentence), std::string::npos)
        << "expected: " << broken.sentence << "\nactual:   " << flash_attn_last_error();
    EXPECT_TRUE(call.outputs_untouched()) << broken.sentence;
  }
}

constexpr int64_t kBatch = 2, kHeads = 4, kHeadsK = 2, kDim = 8, kDimV = 6, kSq = 5, kSk = 7;
constexpr flash_attn_dtype kFp32 = FLASH_ATTN_FLOAT32;

inline void set_score(flash_attn_score_args* score) {
  *score = {};
  score->softmax_scale = 0.5;
  score->window_left = -1;
  score->window_right = -1;
}

// Dense, with every optional tensor.
FwdCall make_fwd();
// Sequences of 2 and 3 queries, 3 and 4 keys.
FwdCall make_varlen_fwd();
// The same over pages of 2 tokens.
FwdCall make_paged_varlen_fwd();
BwdCall make_bwd();
BwdCall make_varlen_bwd();
// Appends 2 tokens at 3 and 4 of a cache of 7 rows, with rotary (dim 16).
KvcacheCall make_kvcache();
// The same with pages of 2 tokens.
KvcacheCall make_paged_kvcache();
CombineCall make_combine();

}  // namespace flash_test
