// Shared memory: told exactly from shapes and strides, and turned down where a call writes.
#include <algorithm>
#include <random>
#include <set>

#include "api/check.h"
#include "api_calls.h"

namespace flash_test {
namespace {

using flash::Arg;

// The addresses of all bytes of x, in order of its elements.
std::vector<const char*> bytes_of(const flash_attn_tensor& x) {
  const int64_t size = flash::element_bytes(x.dtype);
  std::vector<int64_t> elements{0};
  for (int i = 0; i < x.ndim; ++i) {
    std::vector<int64_t> longer;
    for (int64_t first : elements)
      for (int64_t j = 0; j < x.shape[i]; ++j) longer.push_back(first + j * x.stride[i]);
    elements = longer;
  }
  std::vector<const char*> bytes;
  for (int64_t element : elements)
    for (int64_t byte = 0; byte < size; ++byte)
      bytes.push_back(static_cast<const char*>(x.data) + element * size + byte);
  return bytes;
}

bool meet(const flash_attn_tensor& x, const flash_attn_tensor& y) {
  const std::vector<const char*> x_bytes = bytes_of(x), y_bytes = bytes_of(y);
  const std::set<const char*> all(x_bytes.begin(), x_bytes.end());
  return std::any_of(y_bytes.begin(), y_bytes.end(), [&](const char* b) { return all.count(b); });
}

bool meets_itself(const flash_attn_tensor& x) {
  const std::vector<const char*> bytes = bytes_of(x);
  return std::set<const char*>(bytes.begin(), bytes.end()).size() < bytes.size();
}

// Views of `memory`, most of them with the strides of one packed tensor, some with any.
class RandomViews {
 public:
  explicit RandomViews(char* memory) : memory_(memory) {}

  flash_attn_tensor next() {
    flash_attn_tensor x{};
    x.dtype = one_of({FLASH_ATTN_BFLOAT16, FLASH_ATTN_FLOAT32, FLASH_ATTN_INT64});
    x.device_type = FLASH_ATTN_CPU;
    x.ndim = static_cast<int32_t>(one_of({1, 2, 3, 4}));
    const bool packed = below(4) > 0;
    int64_t stride = 1;
    for (int i = x.ndim - 1; i >= 0; --i) {
      x.shape[i] = below(12) == 0 ? 0 : 1 + below(4);
      x.stride[i] = packed ? stride : below(14);
      stride *= one_of({3, 4, 8});
    }
    if (x.ndim > 1 && below(3) == 0) {
      std::swap(x.shape[0], x.shape[1]);
      std::swap(x.stride[0], x.stride[1]);
    }
    x.data = memory_ + below(24) * flash::element_bytes(x.dtype);
    return x;
  }

 private:
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random_); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

  char* memory_;
  std::mt19937 random_{1};
};

TEST(SharedMemory, IsThatOfAnyByte) {
  std::vector<int64_t> memory(4096);
  RandomViews views(reinterpret_cast<char*>(memory.data()));
  int shared = 0, apart = 0, itself = 0;
  for (int i = 0; i < 4000; ++i) {
    const flash_attn_tensor x = views.next(), y = views.next();
    const bool expected = meet(x, y);
    ASSERT_EQ(flash::share_memory({"x", &x}, {"y", &y}), expected) << i;
    ASSERT_EQ(flash::share_memory({"y", &y}, {"x", &x}), expected) << i;
    ASSERT_EQ(flash::overlaps_itself({"x", &x}), meets_itself(x)) << i;
    ++(expected ? shared : apart);
    itself += meets_itself(x);
  }
  EXPECT_GT(shared, 500);  // the test sees enough of either answer
  EXPECT_GT(apart, 500);
  EXPECT_GT(itself, 200);
}

// A tensor of the size that calls have, split in every way that callers do.
TEST(SharedMemory, PartsOfAPackedTensorAreApart) {
  std::vector<uint16_t> memory(1);
  const auto view = [&](int64_t first, std::initializer_list<int64_t> shape,
                        std::initializer_list<int64_t> stride) {
    flash_attn_tensor x{};
    x.data = memory.data() + first;  // never read
    x.dtype = FLASH_ATTN_BFLOAT16;
    x.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), x.shape);
    std::copy(stride.begin(), stride.end(), x.stride);
    return x;
  };
  const int64_t b = 64, s = 4096, h = 32, d = 128, row = 3 * h * d;
  const flash_attn_tensor q = view(0, {b, s, h, d}, {s * row, row, d, 1});
  const flash_attn_tensor k = view(h * d, {b, s, h, d}, {s * row, row, d, 1});
  const flash_attn_tensor left = view(0, {b, s, h, d / 2}, {s * row, row, d, 1});
  const flash_attn_tensor right = view(d / 2, {b, h, s, d / 2}, {s * row, d, row, 1});
  const flash_attn_tensor wider = view(d / 2 - 1, {b, h, s, d / 2}, {s * row, d, row, 1});
  const auto share = [](const flash_attn_tensor& x, const flash_attn_tensor& y) {
    return flash::share_memory({"x", &x}, {"y", &y});
  };
  EXPECT_FALSE(share(q, k));
  EXPECT_FALSE(share(left, right));
  EXPECT_FALSE(share(k, left));
  EXPECT_TRUE(share(q, right));
  EXPECT_TRUE(share(left, wider));
}

// Views into the buffer of `name`, from `first` on.
void put(flash_attn_tensor& x, flash_attn_tensor& where, int64_t first) {
  x.data = static_cast<char*>(where.data) + first * static_cast<int64_t>(element_bytes(x.dtype));
}

TEST(SharedMemory, OutputsRejectIt) {
  expect_rejected<FwdCall>(
      make_fwd, flash_attn_mha_fwd,
      {{"out must not share memory with q", [](auto& c) { put(c["out"], c["q"], 3); }},
       {"out must not share memory with softmax_lse",
        [](auto& c) { put(c["softmax_lse"], c["out"], 3); }},
       {"softmax_lse must not share memory with attn_bias",
        [](auto& c) { put(c["softmax_lse"], c["attn_bias"], 1); }},
       {"out must not share memory with s_aux",  // of another dtype
        [](auto& c) { put(c["s_aux"], c["out"], 7); }}});
  expect_rejected<FwdCall>(make_varlen_fwd, flash_attn_mha_varlen_fwd,
                           {{"out must not share memory with cu_seqlens_k",
                             [](auto& c) { put(c["cu_seqlens_k"], c["out"], 10); }}});
  expect_rejected<BwdCall>(
      make_bwd, flash_attn_mha_bwd,
      {{"dq must not share memory with dout", [](auto& c) { put(c["dq"], c["dout"], 5); }},
       {"dk must not share memory with dv", [](auto& c) { put(c["dv"], c["dk"], 8); }},
       {"softmax_d must not share memory with dlse",
        [](auto& c) { put(c["dlse"], c["softmax_d"], 100); }},
       {"dattn_bias must not share memory with alibi_slopes",
        [](auto& c) { put(c["alibi_slopes"], c["dattn_bias"], 2); }}});
  expect_rejected<CombineCall>(make_combine, flash_attn_combine,
                               {{"out must not share memory with out_partial",
                                 [](auto& c) { put(c["out"], c["out_partial"], 11); }}});
}

// dq, dk and dv in one tensor [b, s, 3, h, d], as the packed functions want them.
TEST(SharedMemory, GradientsMayBePacked) {
  BwdCall c = make_bwd();
  const int64_t d = kDim, row = (kHeads + 2 * kHeadsK) * d;
  flash_attn_tensor* packed = c.add("packed", kFp32, {kBatch, kSk, row});
  c.args.v = c.add("v_wide", kFp32, {kBatch, kSk, kHeadsK, d});
  c.args.out = c.add("out_wide", kFp32, {kBatch, kSq, kHeads, d});
  c.args.dout = c.add("dout_wide", kFp32, {kBatch, kSq, kHeads, d});
  c["dv"].shape[3] = d;
  int64_t first = 0;
  for (const char* name : {"dq", "dk", "dv"}) {
    flash_attn_tensor& x = c[name];
    put(x, *packed, first);
    first += x.shape[2] * d;
    x.stride[0] = kSk * row;
    x.stride[1] = row;
    x.stride[2] = d;
  }
  EXPECT_EQ(flash_attn_mha_bwd(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
  put(c["dk"], *packed, kHeads * d - 1);
  EXPECT_EQ(flash_attn_mha_bwd(&c.args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_attn_last_error(), "dq must not share memory with dk");
}

// ------------------------------------------------------------------------- appending to a cache

constexpr int64_t kRow = kHeadsK * 16;  // elements of a row of make_kvcache's k_cache

// make_kvcache's sequences 0 and 1 append rows 3, 4 of row 2 of the cache and rows 4, 5 of row 0.
int64_t appended(int64_t outer, int64_t row) { return (outer * kSk + row) * kRow; }

TEST(SharedMemory, AppendedRowsRejectIt) {
  const std::vector<Broken<KvcacheCall>> cases = {
      {"k_cache must not share memory with k in the rows that are appended",
       [](auto& c) { put(c["k"], c["k_cache"], appended(0, 3)); }},
      {"k_cache must not share memory with q in the rows that are appended",
       [](auto& c) { put(c["q"], c["k_cache"], appended(2, 3) - 5 * 4 * 16 + 1); }},
      {"k_cache must not share memory with v in the rows that are appended",
       [](auto& c) { put(c["v"], c["k_cache"], appended(2, 4)); }},
      {"k_cache must not share memory with s_aux in the rows that are appended",
       [](auto& c) {
         c.args.score.s_aux = c.add("s_aux", kFp32, {kHeads});
         put(c["s_aux"], c["k_cache"], appended(0, 5));
       }},
      {"v_cache must not share memory with v in the rows that are appended",
       [](auto& c) { put(c["v"], c["v_cache"], (2 * kSk + 3) * kHeadsK * kDimV - 1); }},
      {"out must not share memory with k_cache",
       [](auto& c) { put(c["out"], c["k_cache"], appended(1, 0)); }},
  };
  expect_rejected<KvcacheCall>(make_kvcache, flash_attn_mha_fwd_kvcache, cases);
}

TEST(SharedMemory, AppendedRowsOfPagesRejectIt) {
  expect_rejected<KvcacheCall>(
      make_paged_kvcache, flash_attn_mha_fwd_kvcache,
      {{"k_cache must not share memory with k in the rows that are appended",
        [](auto& c) { put(c["k"], c["k_cache"], 5 * 2 * kRow - 1); }},  // page 5: row 4 of 1
       {"k_cache must not share memory with q in the rows that are appended",
        [](auto& c) { put(c["q"], c["k_cache"], (2 * 2 + 1) * kRow - 1); }}});  // row 4 of 0
}

KvcacheCall without_rotary(KvcacheCall c) {
  c.args.rotary_cos = c.args.rotary_sin = nullptr;
  return c;
}

void expect_ok(KvcacheCall c) {
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&c.args), FLASH_ATTN_OK) << flash_attn_last_error();
}

TEST(SharedMemory, OtherRowsOfTheCacheMayBeRead) {
  KvcacheCall c = make_kvcache();
  put(c["k"], c["k_cache"], appended(1, 0));  // a row of the cache that no sequence has
  c.args.score.s_aux = c.add("s_aux", kFp32, {kHeads});
  put(c["s_aux"], c["k_cache"], appended(0, 6));
  expect_ok(std::move(c));
}

// Rows 3 and 4 of rows 0 and 2 of the cache are appended, and are k.
KvcacheCall in_place() {
  KvcacheCall c = make_kvcache();
  c.int32("cache_batch_idx", 0) = 0;
  c.int32("cache_batch_idx", 1) = 2;
  c.int32("cache_seqlens", 1) = 3;
  put(c["k"], c["k_cache"], appended(0, 3));
  c["k"].stride[0] = 2 * kSk * kRow;
  c.args.score.s_aux = c.add("s_aux", kFp32, {kHeads});
  return c;
}

TEST(SharedMemory, NewRowsMayLieInTheirPlaces) {
  expect_ok(in_place());
  expect_ok(without_rotary(in_place()));
  KvcacheCall c = without_rotary(in_place());
  put(c["s_aux"], c["k_cache"], appended(0, 3));  // the memory stays as it is
  expect_ok(std::move(c));
  c = in_place();
  put(c["s_aux"], c["k_cache"], appended(0, 3));  // rotated before it is read
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&c.args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_attn_last_error(),
               "k_cache must not share memory with s_aux in the rows that are appended");
  c = in_place();
  c.int32("cache_seqlens", 1) = 4;  // one row beside its place
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&c.args), FLASH_ATTN_INVALID_ARGUMENT);
}

// v_cache and v are elements [first, first + 6) of the rows of k_cache and k.
KvcacheCall shared_rows(int64_t first) {
  KvcacheCall c = make_kvcache();
  for (const auto& [part, whole] : {std::pair("v_cache", "k_cache"), std::pair("v", "k")}) {
    c[part] = c[whole];
    put(c[part], c[whole], first);
    c[part].shape[3] = kDimV;
  }
  return c;
}

TEST(SharedMemory, ValuesMayBePartsOfTheKeys) {
  expect_ok(without_rotary(shared_rows(0)));
  expect_ok(without_rotary(shared_rows(10)));
  KvcacheCall c = without_rotary(shared_rows(0));
  std::swap(c.args.k, c.args.v);  // keys as parts of the values
  std::swap(c.args.k_cache, c.args.v_cache);
  c["q"].shape[3] = kDimV;
  c.args.out = c.add("wide_out", kFp32, {kBatch, kSq, kHeads, 16});
  expect_ok(std::move(c));

  c = shared_rows(10);
  c["rotary_cos"].shape[1] = c["rotary_sin"].shape[1] = 5;  // rotates elements 0 to 9
  expect_ok(std::move(c));
}

TEST(SharedMemory, ValuesThatDisagreeWithTheKeysAreRejected) {
  const auto expect_error = [](KvcacheCall c, const char* sentence) {
    EXPECT_EQ(flash_attn_mha_fwd_kvcache(&c.args), FLASH_ATTN_INVALID_ARGUMENT) << sentence;
    EXPECT_EQ(std::string(flash_attn_last_error()).substr(0, std::strlen(sentence)), sentence);
    EXPECT_TRUE(c.outputs_untouched()) << sentence;
  };
  const char* part = "v must be the part of k that v_cache is of k_cache";
  KvcacheCall c = without_rotary(shared_rows(2));
  put(c["v"], c["k"], 3);
  expect_error(std::move(c), part);
  c = without_rotary(shared_rows(2));
  c["v"] = *c.add("other_v", kFp32, {kBatch, 2, kHeadsK, kDimV});
  expect_error(std::move(c), part);
  c = without_rotary(shared_rows(2));
  c["v"].stride[1] = 0;
  expect_error(std::move(c), part);
  const char* caches = "k_cache must not share memory with v_cache, unless the rows of one are";
  c = without_rotary(shared_rows(11));  // the last element is the next head's
  expect_error(std::move(c), caches);
  c = without_rotary(shared_rows(0));
  put(c["v_cache"], c["k_cache"], kRow);  // the next row
  c["v_cache"].shape[1] = c["k_cache"].shape[1] = kSk - 1;
  expect_error(std::move(c), caches);
  c = shared_rows(10);
  expect_error(std::move(c), "rotary embedding must not change the part of k_cache that v_cache");
}

// Both caches in one tensor, [.., 2, ..] or side by side in a row.
TEST(SharedMemory, CachesMayBePacked) {
  for (const int64_t inner : {kHeadsK * 16L, 16L}) {
    KvcacheCall c = make_kvcache();
    flash_attn_tensor* packed = c.add("packed", kFp32, {3, kSk, kHeadsK, 2, 16});
    for (const char* name : {"k_cache", "v_cache"}) {
      c[name].stride[0] = kSk * kHeadsK * 32;
      c[name].stride[1] = kHeadsK * 32;
      c[name].stride[2] = inner == 16 ? 32 : 16;
    }
    put(c["k_cache"], *packed, 0);
    put(c["v_cache"], *packed, inner);
    expect_ok(std::move(c));
  }
}

}  // namespace
}  // namespace flash_test
