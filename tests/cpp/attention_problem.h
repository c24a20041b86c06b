// Random inputs of one attention call, dense or packed, and its outputs: from a CPU kernel, or from
// the definition.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "attention_reference.h"
#include "cpu/cpu_backend.h"
#include "poison_tensor.h"

namespace flash_test {

struct AttentionCase {
  flash::Dtype dtype = flash::Dtype::kFloat32;
  int h = 2, h_k = 1, d = 16, d_v = 16;
  std::vector<int> seqlens_q = {40}, seqlens_k = {50};  // of each sequence
  bool packed = false;                                  // else all sequences are equally long
  int64_t left = -1, right = -1;
  double softcap = 0.;
  int alibi_dims = 0;  // 1: slopes [h], 2: [b, h]
  bool has_bias = false;
  std::array<bool, 4> bias_extents = {true, true, true, true};  // false: broadcast
  flash::Dtype bias_dtype = flash::Dtype::kFloat32;
  bool has_sink = false, has_dlse = false;
  double p_dropout = 0.;
  int num_splits = 0;

  int sequences() const { return static_cast<int>(seqlens_q.size()); }
};
std::ostream& operator<<(std::ostream& os, const AttentionCase& c);

// Every feature on or off at random; small enough for the definition.
AttentionCase random_case(uint32_t seed);

struct AttentionOutputs {
  // q, k, v's shapes: [b, s, h, d], packed [1, total, h, d]; lse [1, b, h, sq], packed
  // [1, 1, h, total_q]; softmax_d as lse; ds_aux [1, 1, 1, h]; dbias as the bias.
  PoisonTensor out, lse, dq, dk, dv, softmax_d, ds_aux, dbias;

  struct Named {
    const char* name;
    PoisonTensor* tensor;
    int64_t terms = 1;  // that each element sums over queries or broadcast dimensions
  };
  std::vector<Named> written(const AttentionCase& c);  // those that a call of the case writes
};

class AttentionProblem {
 public:
  AttentionProblem(const AttentionCase& c, uint32_t seed);

  const AttentionCase& shape() const { return case_; }
  AttentionOutputs run(const flash::cpu::Kernels& kernels);  // forward, then backward
  AttentionOutputs reference() const;                        // in fp32, whatever the case's dtype
  AttentionHead head(int b, int h) const;
  // The problem of sequence b with nothing else in the batch.
  AttentionProblem alone(int b) const;

  // Where element (row, head, dim) of a sequence lies in q-like and k-like tensors, and (head, row)
  // in lse.
  PoisonTensor::Index q_index(int b, int row, int h, int dim) const;
  PoisonTensor::Index k_index(int b, int row, int h, int dim) const;
  PoisonTensor::Index lse_index(int b, int h, int row) const;

  // What run() does, for other calls.
  AttentionOutputs make_outputs(flash::Dtype dtype) const;
  flash::Flash_bwd_params params(AttentionOutputs& outputs);

 private:
  PoisonTensor::Index dlse_index(int b, int h, int row) const;
  PoisonTensor::Index softmax_d_index(int b, int h, int row) const;
  PoisonTensor::Index bias_index(int b, int h, int row, int key) const;
  void set_operands(flash::Flash_bwd_params& p, AttentionOutputs& r);
  void set_score(flash::Flash_bwd_params& p, AttentionOutputs& r);
  Matrix keep_factors(int b, int h) const;  // dropout's
  void add_backward(AttentionOutputs& r, int b, int h) const;

  AttentionCase case_;
  std::vector<int32_t> cu_seqlens_q_, cu_seqlens_k_;
  int seqlen_q_, seqlen_k_;  // the longest
  int rows_q_, rows_k_;      // of a batch entry of the tensors

 public:
  PoisonTensor q, k, v, dout, bias, slopes, sink, dlse;
};

}  // namespace flash_test
