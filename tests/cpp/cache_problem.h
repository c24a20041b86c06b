// Random inputs of one call that reads keys from a cache: appended to or not, paged or not, or
// packed queries over it.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "attention_reference.h"
#include "cpu/cpu_backend.h"
#include "poison_tensor.h"

namespace flash_test {

struct CacheCase {
  flash::Dtype dtype = flash::Dtype::kFloat32;
  int h = 4, h_k = 2, d = 32, d_v = 16;
  std::vector<int> seqlens_q = {3, 3};  // equal unless packed
  bool packed = false;                  // queries, and keys unless paged, by cu_seqlens
  int capacity = 100;                   // rows for each sequence
  std::vector<int> cached = {40, 90};   // rows in use before the call, left padding included
  std::vector<int> leftpad = {0, 0};
  int appended = 0;
  int page_size = 0;       // 0: not paged
  bool other_row = false;  // cache_batch_idx names another row of the cache
  int rotary_dim = 0;
  bool interleaved = false;
  int64_t left = -1, right = -1;
  double softcap = 0.;
  bool has_alibi = false, has_sink = false;
  int num_splits = 0;

  int sequences() const { return static_cast<int>(seqlens_q.size()); }
};
std::ostream& operator<<(std::ostream& os, const CacheCase& c);
CacheCase random_cache_case(uint32_t seed);

class CacheProblem {
 public:
  CacheProblem(const CacheCase& c, uint32_t seed);
  // Appends to this problem's caches.
  void run(const flash::cpu::Kernels& kernels);

  // What the caches must hold after the call, and what it must return given the caches as they are.
  PoisonTensor expected_k_cache() const { return expected_cache(k_cache, k_new, true); }
  PoisonTensor expected_v_cache() const { return expected_cache(v_cache, v_new, false); }
  void expected_outputs(PoisonTensor& out, PoisonTensor& lse) const;

 private:
  PoisonTensor expected_cache(const PoisonTensor& cache, const PoisonTensor& added,
                              bool rotated) const;
  AttentionHead head(int b, int h) const;
  // Element `dim` of a row after rotation to `position`.
  template <class Row>
  double rotated(Row row, int dim, int position) const;
  PoisonTensor::Index cache_index(int b, int row, int h, int dim) const;
  PoisonTensor::Index q_index(int b, int row, int h, int dim) const;
  flash::Flash_fwd_params params();
  void set_cache(flash::Flash_fwd_params& p);

  CacheCase case_;
  int pages_;  // of a sequence
  std::vector<int32_t> cu_seqlens_q_, cu_seqlens_k_, batch_idx_, block_table_;

 public:
  PoisonTensor q, k_cache, v_cache, k_new, v_new, cos, sin, slopes, sink, out, lse;
};

}  // namespace flash_test
