#include "attention_problem.h"

#include <algorithm>
#include <cmath>
#include <ostream>
#include <random>

#include "common/dropout.h"

namespace flash_test {
namespace {

constexpr uint64_t kSeed = 0x9e3779b97f4a7c15, kOffset = 1234567;
constexpr int kRowsOfNoSequence = 3;  // at the end of packed tensors
constexpr int kRound = 128;           // softmax_d's rows are padded to it

std::vector<int32_t> cumulative(const std::vector<int>& lengths) {
  std::vector<int32_t> sums = {0};
  for (int n : lengths) sums.push_back(sums.back() + n);
  return sums;
}
int longest(const std::vector<int>& lengths) {
  return *std::max_element(lengths.begin(), lengths.end());
}
int round_up(int n) { return (n + kRound - 1) / kRound * kRound; }

flash::Bias bias_view(PoisonTensor& x) {
  const PoisonTensor::Index& n = x.shape();
  const auto stride = [&](int dim) { return n[dim] == 1 ? 0 : x.stride(dim); };  // broadcast
  return {x.data(), x.dtype(), stride(0), stride(1), stride(2), stride(3), n[0], n[1], n[2], n[3]};
}

}  // namespace

std::ostream& operator<<(std::ostream& os, const AttentionCase& c) {
  os << "dtype " << static_cast<int>(c.dtype) << " h " << c.h << " h_k " << c.h_k << " d " << c.d
     << " dv " << c.d_v << (c.packed ? " packed" : "") << " sequences";
  for (int b = 0; b < c.sequences(); ++b) os << " " << c.seqlens_q[b] << "x" << c.seqlens_k[b];
  os << " window " << c.left << "," << c.right << " softcap " << c.softcap << " alibi "
     << c.alibi_dims << " sink " << c.has_sink << " dlse " << c.has_dlse << " dropout "
     << c.p_dropout << " splits " << c.num_splits;
  if (c.has_bias) os << " bias";
  for (bool full : c.bias_extents) os << (!c.has_bias ? "" : full ? " n" : " 1");
  return os;
}

AttentionCase random_case(uint32_t seed) {
  std::mt19937 rng(seed);
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  const auto one_in = [&](int n) { return below(n) == 0; };
  constexpr int kDims[] = {1, 3, 8, 16, 31, 40, 64, 80, 128, 192, 256, 576};
  constexpr double kProducts = 2e6;
  AttentionCase c;
  c.dtype = one_in(3) ? static_cast<flash::Dtype>(below(2)) : flash::Dtype::kFloat32;
  c.h_k = 1 + below(2);
  c.h = c.h_k * (1 + below(3));
  c.d = kDims[below(std::size(kDims))];
  c.d_v = one_in(3) ? kDims[below(std::size(kDims))] : c.d;
  c.packed = one_in(2);
  const int sequences = 1 + below(3);
  const double affordable = std::sqrt(kProducts / (sequences * c.h * (c.d + c.d_v)));
  const int largest = std::min(static_cast<int>(2 * affordable), 400);
  const auto length = [&] { return one_in(8) ? below(2) : 1 + below(largest); };
  c.seqlens_q.assign(sequences, std::max(length(), 1));
  c.seqlens_k.assign(sequences, std::max(length(), 1));
  for (int b = 0; b < sequences && c.packed; ++b) {
    c.seqlens_q[b] = length();
    c.seqlens_k[b] = length();
  }
  if (one_in(2)) c.right = one_in(2) ? 0 : below(40);
  if (one_in(3)) c.left = below(100);
  if (one_in(4)) c.softcap = 2.;
  if (one_in(4)) c.alibi_dims = 1 + below(2);
  c.has_bias = one_in(3);
  for (bool& full : c.bias_extents) full = one_in(2);
  if (one_in(2)) c.bias_dtype = c.dtype;
  c.has_sink = one_in(4);
  c.has_dlse = one_in(3);
  if (one_in(4)) c.p_dropout = 0.3;
  if (one_in(3)) c.num_splits = 1 + below(4);
  return c;
}

std::vector<AttentionOutputs::Named> AttentionOutputs::written(const AttentionCase& c) {
  std::vector<Named> x = {{"out", &out}, {"lse", &lse}, {"dq", &dq},
                          {"dk", &dk},   {"dv", &dv},   {"softmax_d", &softmax_d}};
  const int64_t queries = out.shape()[0] * out.shape()[1];
  if (c.has_sink) x.push_back({"ds_aux", &ds_aux, queries});
  int64_t terms = queries * c.h * longest(c.seqlens_k);
  for (int64_t extent : dbias.shape()) terms /= std::max<int64_t>(extent, 1);
  if (c.has_bias) x.push_back({"dbias", &dbias, std::max<int64_t>(terms, 1)});
  return x;
}

AttentionProblem::AttentionProblem(const AttentionCase& c, uint32_t seed)
    : case_(c),
      cu_seqlens_q_(cumulative(c.seqlens_q)),
      cu_seqlens_k_(cumulative(c.seqlens_k)),
      seqlen_q_(longest(c.seqlens_q)),
      seqlen_k_(longest(c.seqlens_k)),
      rows_q_(c.packed ? cu_seqlens_q_.back() + kRowsOfNoSequence : seqlen_q_),
      rows_k_(c.packed ? cu_seqlens_k_.back() + kRowsOfNoSequence : seqlen_k_),
      q(c.dtype, {c.packed ? 1 : c.sequences(), rows_q_, c.h, c.d}, 3),
      k(c.dtype, {c.packed ? 1 : c.sequences(), rows_k_, c.h_k, c.d}, 1),
      v(c.dtype, {c.packed ? 1 : c.sequences(), rows_k_, c.h_k, c.d_v}, 2),
      dout(c.dtype, {c.packed ? 1 : c.sequences(), rows_q_, c.h, c.d_v}),
      bias(c.bias_dtype,
           {c.bias_extents[0] ? c.sequences() : 1, c.bias_extents[1] ? c.h : 1,
            c.bias_extents[2] ? seqlen_q_ : 1, c.bias_extents[3] ? seqlen_k_ : 1},
           5),
      slopes(flash::Dtype::kFloat32, {1, 1, c.alibi_dims == 2 ? c.sequences() : 1, c.h}, 1),
      sink(c.dtype, {1, 1, c.h, 1}, 1),
      dlse(flash::Dtype::kFloat32, {c.packed ? 1 : c.sequences(), c.h, rows_q_, 1}, 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  const auto draw = [&] { return normal(rng); };
  // Rows of no sequence stay NaN.
  for (int b = 0; b < c.sequences(); ++b) {
    for (int i = 0; i < c.seqlens_q[b]; ++i)
      for (int h = 0; h < c.h; ++h) {
        for (int x = 0; x < c.d; ++x) q.set(q_index(b, i, h, x), draw());
        for (int x = 0; x < c.d_v; ++x) dout.set(q_index(b, i, h, x), draw());
        dlse.set(dlse_index(b, h, i), draw());
      }
    for (int j = 0; j < c.seqlens_k[b]; ++j)
      for (int h = 0; h < c.h_k; ++h) {
        for (int x = 0; x < c.d; ++x) k.set(k_index(b, j, h, x), draw());
        for (int x = 0; x < c.d_v; ++x) v.set(k_index(b, j, h, x), draw());
      }
  }
  bias.fill(draw);
  slopes.fill([&] { return std::fabs(draw()) * 0.1; });
  sink.fill(draw);
}

PoisonTensor::Index AttentionProblem::q_index(int b, int row, int h, int dim) const {
  if (case_.packed) return {0, cu_seqlens_q_[b] + row, h, dim};
  return {b, row, h, dim};
}
PoisonTensor::Index AttentionProblem::k_index(int b, int row, int h, int dim) const {
  if (case_.packed) return {0, cu_seqlens_k_[b] + row, h, dim};
  return {b, row, h, dim};
}
PoisonTensor::Index AttentionProblem::lse_index(int b, int h, int row) const {
  if (case_.packed) return {0, 0, h, cu_seqlens_q_[b] + row};
  return {0, b, h, row};
}
PoisonTensor::Index AttentionProblem::dlse_index(int b, int h, int row) const {
  const PoisonTensor::Index i = lse_index(b, h, row);
  return {i[1], i[2], i[3], 0};
}
PoisonTensor::Index AttentionProblem::softmax_d_index(int b, int h, int row) const {
  PoisonTensor::Index i = lse_index(b, h, row);
  if (case_.packed) i[3] += kRound * b;
  return i;
}
PoisonTensor::Index AttentionProblem::bias_index(int b, int h, int row, int key) const {
  const PoisonTensor::Index full = {b, h, row, key};
  PoisonTensor::Index i;
  for (int dim = 0; dim < 4; ++dim) i[dim] = case_.bias_extents[dim] ? full[dim] : 0;
  return i;
}

AttentionOutputs AttentionProblem::make_outputs(flash::Dtype dtype) const {
  constexpr flash::Dtype kFp32 = flash::Dtype::kFloat32;
  const int64_t b = case_.packed ? 1 : case_.sequences();
  const int64_t d_rows = case_.packed ? rows_q_ + kRound * case_.sequences() : round_up(seqlen_q_);
  return {PoisonTensor(dtype, dout.shape(), 3),    PoisonTensor(kFp32, {1, b, case_.h, rows_q_}, 2),
          PoisonTensor(dtype, q.shape(), 1),       PoisonTensor(dtype, k.shape(), 2),
          PoisonTensor(dtype, v.shape(), 5),       PoisonTensor(kFp32, {1, b, case_.h, d_rows}, 1),
          PoisonTensor(kFp32, {1, 1, 1, case_.h}), PoisonTensor(kFp32, bias.shape(), 3)};
}

void AttentionProblem::set_operands(flash::Flash_bwd_params& p, AttentionOutputs& r) {
  const AttentionCase& c = case_;
  const auto operand = [&](PoisonTensor& x) { return c.packed ? x.packed_operand() : x.operand(); };
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  p.o = operand(r.out);
  p.dout = operand(dout);
  p.dq = operand(r.dq);
  p.dk = operand(r.dk);
  p.dv = operand(r.dv);
  p.softmax_lse = r.lse.floats();
  p.lse_batch_stride = c.packed ? 0 : r.lse.stride(1);
  p.lse_head_stride = r.lse.stride(2);
  p.dsoftmax_sum = r.softmax_d.floats();
  p.dsoftmax_batch_stride = c.packed ? 0 : r.softmax_d.stride(1);
  p.dsoftmax_head_stride = r.softmax_d.stride(2);
  if (!c.has_dlse) return;
  p.dlse = dlse.floats();
  p.dlse_batch_stride = c.packed ? 0 : dlse.stride(0);
  p.dlse_head_stride = dlse.stride(1);
  p.dlse_row_stride = dlse.stride(2);
}

void AttentionProblem::set_score(flash::Flash_bwd_params& p, AttentionOutputs& r) {
  const AttentionCase& c = case_;
  p.scale_softmax = static_cast<float>(1 / std::sqrt(c.d));
  p.softcap = static_cast<float>(c.softcap);
  p.window_left = c.left;
  p.window_right = c.right;
  if (c.alibi_dims > 0) p.alibi_slopes = slopes.floats();
  p.alibi_batch_stride = c.alibi_dims == 2 ? slopes.stride(2) : 0;
  if (c.has_sink) {
    p.s_aux = sink.data();
    p.s_aux_dtype = sink.dtype();
    p.s_aux_stride = sink.stride(2);
    p.ds_aux = r.ds_aux.floats();
  }
  if (c.has_bias) {
    p.bias = bias_view(bias);
    p.dbias = bias_view(r.dbias);
  }
  p.p_dropout = static_cast<float>(c.p_dropout);
  p.seed = kSeed;
  p.offset = kOffset;
}

flash::Flash_bwd_params AttentionProblem::params(AttentionOutputs& r) {
  const AttentionCase& c = case_;
  flash::Flash_bwd_params p;
  p.dtype = p.kv_dtype = p.o_dtype = c.dtype;
  p.b = c.sequences();
  p.h = c.h;
  p.h_k = c.h_k;
  p.d = c.d;
  p.d_v = c.d_v;
  p.seqlen_q = seqlen_q_;
  p.seqlen_k = seqlen_k_;
  p.total_q = c.packed ? rows_q_ : p.b * seqlen_q_;
  p.total_k = c.packed ? rows_k_ : p.b * seqlen_k_;
  if (c.packed) {
    p.cu_seqlens_q = cu_seqlens_q_.data();
    p.cu_seqlens_k = cu_seqlens_k_.data();
  }
  set_operands(p, r);
  set_score(p, r);
  return p;
}

AttentionOutputs AttentionProblem::run(const flash::cpu::Kernels& kernels) {
  AttentionOutputs r = make_outputs(case_.dtype);
  const flash::Flash_bwd_params p = params(r);
  kernels.mha_fwd({p, {}, case_.num_splits});
  kernels.mha_bwd(p);
  return r;
}

Matrix AttentionProblem::keep_factors(int b, int h) const {
  const auto dropout = flash::Dropout::make(static_cast<float>(case_.p_dropout), kSeed, kOffset);
  Matrix keep(case_.seqlens_q[b], case_.seqlens_k[b]);
  for (int i = 0; i < keep.rows; ++i)
    for (int j = 0; j < keep.columns; ++j) {
      uint8_t bytes[32];
      dropout.row_bytes(b * case_.h + h, i, j / 32, bytes);
      keep(i, j) = bytes[j % 32] <= dropout.keep_threshold ? dropout.rescale : 0.;
    }
  return keep;
}

AttentionHead AttentionProblem::head(int b, int h) const {
  const AttentionCase& c = case_;
  const int sq = c.seqlens_q[b], sk = c.seqlens_k[b], h_k = h / (c.h / c.h_k);
  AttentionHead x;
  x.q = Matrix(sq, c.d);
  x.k = Matrix(sk, c.d);
  x.v = Matrix(sk, c.d_v);
  for (int i = 0; i < sq; ++i)
    for (int dim = 0; dim < c.d; ++dim) x.q(i, dim) = q.get(q_index(b, i, h, dim));
  for (int j = 0; j < sk; ++j) {
    for (int dim = 0; dim < c.d; ++dim) x.k(j, dim) = k.get(k_index(b, j, h_k, dim));
    for (int dim = 0; dim < c.d_v; ++dim) x.v(j, dim) = v.get(k_index(b, j, h_k, dim));
  }
  x.scale = 1 / std::sqrt(c.d);
  x.softcap = c.softcap;
  x.left = c.left;
  x.right = c.right;
  if (c.alibi_dims > 0) x.alibi_slope = slopes.get({0, 0, c.alibi_dims == 2 ? b : 0, h});
  x.has_sink = c.has_sink;
  x.sink = sink.get({0, 0, h, 0});
  if (c.has_bias) {
    x.bias = Matrix(sq, sk);
    for (int i = 0; i < sq; ++i)
      for (int j = 0; j < sk; ++j) x.bias(i, j) = bias.get(bias_index(b, h, i, j));
  }
  if (c.p_dropout > 0) x.keep = keep_factors(b, h);
  return x;
}

void AttentionProblem::add_backward(AttentionOutputs& r, int b, int h) const {
  const AttentionCase& c = case_;
  const int sq = c.seqlens_q[b], sk = c.seqlens_k[b], h_k = h / (c.h / c.h_k);
  Matrix gradient(sq, c.d_v);
  std::vector<double> lse_gradient(sq);
  for (int i = 0; i < sq; ++i) {
    for (int dim = 0; dim < c.d_v; ++dim) gradient(i, dim) = dout.get(q_index(b, i, h, dim));
    if (c.has_dlse) lse_gradient[i] = dlse.get(dlse_index(b, h, i));
  }
  const AttentionGradients g = attend_backward(head(b, h), gradient, lse_gradient);
  for (int i = 0; i < sq; ++i) {
    for (int dim = 0; dim < c.d; ++dim) r.dq.set(q_index(b, i, h, dim), g.dq(i, dim));
    r.softmax_d.set(softmax_d_index(b, h, i), g.softmax_d[i]);
    if (!c.has_bias) continue;
    for (int j = 0; j < sk; ++j) r.dbias.add(bias_index(b, h, i, j), g.dbias(i, j));
  }
  for (int j = 0; j < sk; ++j) {
    for (int dim = 0; dim < c.d; ++dim) r.dk.add(k_index(b, j, h_k, dim), g.dk(j, dim));
    for (int dim = 0; dim < c.d_v; ++dim) r.dv.add(k_index(b, j, h_k, dim), g.dv(j, dim));
  }
  if (c.has_sink) r.ds_aux.add({0, 0, 0, h}, g.dsink);
}

AttentionOutputs AttentionProblem::reference() const {
  AttentionOutputs r = make_outputs(flash::Dtype::kFloat32);
  for (const AttentionOutputs::Named& x : r.written(case_)) x.tensor->fill([] { return 0.; });
  r.lse.fill([] { return -HUGE_VAL; });  // of rows of no sequence
  for (int b = 0; b < case_.sequences(); ++b)
    for (int h = 0; h < case_.h; ++h) {
      const AttentionResult result = attend(head(b, h));
      for (int i = 0; i < case_.seqlens_q[b]; ++i) {
        r.lse.set(lse_index(b, h, i), result.lse[i]);
        for (int dim = 0; dim < case_.d_v; ++dim)
          r.out.set(q_index(b, i, h, dim), result.out(i, dim));
      }
      add_backward(r, b, h);
    }
  return r;
}

AttentionProblem AttentionProblem::alone(int b) const {
  AttentionCase c = case_;
  c.packed = false;
  c.seqlens_q = {case_.seqlens_q[b]};
  c.seqlens_k = {case_.seqlens_k[b]};
  AttentionProblem x(c, 0);
  const auto copy = [](PoisonTensor& to, const PoisonTensor& from, auto place) {
    to.for_each([&](const PoisonTensor::Index& i) { to.set(i, from.get(place(i))); });
  };
  const auto of_q = [&](const PoisonTensor::Index& i) { return q_index(b, i[1], i[2], i[3]); };
  const auto of_k = [&](const PoisonTensor::Index& i) { return k_index(b, i[1], i[2], i[3]); };
  copy(x.q, q, of_q);
  copy(x.dout, dout, of_q);
  copy(x.k, k, of_k);
  copy(x.v, v, of_k);
  copy(x.dlse, dlse, [&](const PoisonTensor::Index& i) { return dlse_index(b, i[1], i[2]); });
  copy(x.bias, bias, [&](const PoisonTensor::Index& i) { return bias_index(b, i[1], i[2], i[3]); });
  copy(x.slopes, slopes, [&](const PoisonTensor::Index& i) {
    return PoisonTensor::Index{0, 0, case_.alibi_dims == 2 ? b : 0, i[3]};
  });
  copy(x.sink, sink, [](const PoisonTensor::Index& i) { return i; });
  return x;
}

}  // namespace flash_test
