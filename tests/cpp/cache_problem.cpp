#include "cache_problem.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <ostream>
#include <random>

namespace flash_test {
namespace {

int sum(const std::vector<int>& x) { return std::accumulate(x.begin(), x.end(), 0); }

PoisonTensor::Index cache_shape(const CacheCase& c, int pages, int d) {
  if (c.page_size > 0) return {c.sequences() * pages + 2, c.page_size, c.h_k, d};
  if (c.packed) return {1, c.sequences() * c.capacity, c.h_k, d};
  return {c.sequences() + 1, c.capacity, c.h_k, d};
}
PoisonTensor::Index q_shape(const CacheCase& c, int d) {
  if (c.packed) return {1, sum(c.seqlens_q), c.h, d};
  return {c.sequences(), c.seqlens_q[0], c.h, d};
}
PoisonTensor::Index lse_shape(const CacheCase& c) {
  if (c.packed) return {1, 1, c.h, sum(c.seqlens_q)};
  return {1, c.sequences(), c.h, c.seqlens_q[0]};
}

}  // namespace

std::ostream& operator<<(std::ostream& os, const CacheCase& c) {
  os << "dtype " << static_cast<int>(c.dtype) << " h " << c.h << " h_k " << c.h_k << " d " << c.d
     << " dv " << c.d_v << (c.packed ? " packed" : "") << " sequences (q, cached, leftpad)";
  for (int b = 0; b < c.sequences(); ++b)
    os << " " << c.seqlens_q[b] << "," << c.cached[b] << "," << c.leftpad[b];
  return os << " capacity " << c.capacity << " appended " << c.appended << " page " << c.page_size
            << " other_row " << c.other_row << " rotary " << c.rotary_dim
            << (c.interleaved ? " interleaved" : "") << " window " << c.left << "," << c.right
            << " softcap " << c.softcap << " alibi " << c.has_alibi << " sink " << c.has_sink
            << " splits " << c.num_splits;
}

CacheCase random_cache_case(uint32_t seed) {
  std::mt19937 rng(seed);
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  const auto one_in = [&](int n) { return below(n) == 0; };
  constexpr int kDims[] = {1, 8, 32, 40, 64, 128, 192, 256};
  CacheCase c;
  c.dtype = one_in(3) ? static_cast<flash::Dtype>(below(2)) : flash::Dtype::kFloat32;
  c.h_k = 1 + below(2);
  c.h = c.h_k * (1 + below(4));
  c.d = kDims[below(std::size(kDims))];
  c.d_v = one_in(3) ? kDims[below(std::size(kDims))] : c.d;
  c.packed = one_in(3);
  const int sequences = 1 + below(3);
  c.capacity = 1 + below(1500);
  c.seqlens_q.assign(sequences, one_in(2) ? 1 : 1 + below(12));
  for (int& n : c.seqlens_q)
    if (c.packed) n = below(12);
  if (!c.packed && one_in(2)) c.appended = 1 + below(std::min(c.capacity, 9));
  c.cached.assign(sequences, 0);
  c.leftpad.assign(sequences, 0);
  const bool padded = one_in(3);
  for (int b = 0; b < sequences; ++b) {
    c.cached[b] = below(c.capacity - c.appended + 1);
    if (padded) c.leftpad[b] = below(c.cached[b] + 1);
  }
  if (one_in(2)) c.page_size = 1 + below(70);
  c.other_row = !c.packed && c.page_size == 0 && one_in(2);
  if (c.appended > 0 && one_in(2)) c.rotary_dim = 2 * below(c.d / 2 + 1);
  c.interleaved = one_in(2);
  if (one_in(2)) c.right = one_in(2) ? 0 : below(5);
  if (one_in(3)) c.left = below(300);
  if (one_in(4)) c.softcap = 2.;
  c.has_alibi = one_in(4);
  c.has_sink = one_in(4);
  if (one_in(3)) c.num_splits = 1 + below(5);
  return c;
}

CacheProblem::CacheProblem(const CacheCase& c, uint32_t seed)
    : case_(c),
      pages_(c.page_size > 0 ? (c.capacity + c.page_size - 1) / c.page_size : 0),
      q(c.dtype, q_shape(c, c.d), 1),
      k_cache(c.dtype, cache_shape(c, pages_, c.d), 2),
      v_cache(c.dtype, cache_shape(c, pages_, c.d_v), 3),
      k_new(c.dtype, {c.sequences(), c.appended, c.h_k, c.d}, 1),
      v_new(c.dtype, {c.sequences(), c.appended, c.h_k, c.d_v}, 2),
      cos(c.dtype, {1, 1, c.capacity + 20, c.rotary_dim / 2}, 1),
      sin(c.dtype, {1, 1, c.capacity + 20, c.rotary_dim / 2}, 3),
      slopes(flash::Dtype::kFloat32, {1, 1, 1, c.h}),
      sink(c.dtype, {1, 1, 1, c.h}),
      out(c.dtype, q_shape(c, c.d_v), 4),
      lse(flash::Dtype::kFloat32, lse_shape(c), 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  const auto draw = [&] { return normal(rng); };
  cu_seqlens_q_ = cu_seqlens_k_ = {0};
  for (int b = 0; b < c.sequences(); ++b) {
    cu_seqlens_q_.push_back(cu_seqlens_q_.back() + c.seqlens_q[b]);
    cu_seqlens_k_.push_back(cu_seqlens_k_.back() + (pages_ > 0 ? c.cached[b] : c.capacity));
    batch_idx_.push_back(c.other_row ? (b + 1) % (c.sequences() + 1) : b);
  }
  block_table_.resize(c.sequences() * pages_ + 2);
  std::iota(block_table_.begin(), block_table_.end(), 0);
  std::shuffle(block_table_.begin(), block_table_.end(), rng);
  // The rest of the caches stays NaN.
  for (int b = 0; b < c.sequences(); ++b)
    for (int row = c.leftpad[b]; row < c.cached[b]; ++row)
      for (int h = 0; h < c.h_k; ++h) {
        for (int x = 0; x < c.d; ++x) k_cache.set(cache_index(b, row, h, x), draw());
        for (int x = 0; x < c.d_v; ++x) v_cache.set(cache_index(b, row, h, x), draw());
      }
  for (PoisonTensor* x : {&q, &k_new, &v_new, &sink}) x->fill(draw);
  slopes.fill([&] { return 0.1 * std::fabs(draw()); });
  cos.for_each([&](const PoisonTensor::Index& i) {
    const double angle = static_cast<double>(i[2]) * std::pow(10., -0.1 * i[3]);
    cos.set(i, std::cos(angle));
    sin.set(i, std::sin(angle));
  });
}

PoisonTensor::Index CacheProblem::cache_index(int b, int row, int h, int dim) const {
  if (case_.page_size > 0)
    return {block_table_[b * pages_ + row / case_.page_size], row % case_.page_size, h, dim};
  if (case_.packed) return {0, cu_seqlens_k_[b] + row, h, dim};
  return {batch_idx_[b], row, h, dim};
}
PoisonTensor::Index CacheProblem::q_index(int b, int row, int h, int dim) const {
  if (case_.packed) return {0, cu_seqlens_q_[b] + row, h, dim};
  return {b, row, h, dim};
}

void CacheProblem::set_cache(flash::Flash_fwd_params& p) {
  const CacheCase& c = case_;
  const bool packed_k = c.packed && pages_ == 0;
  p.k = packed_k ? k_cache.packed_operand() : k_cache.operand();
  p.v = packed_k ? v_cache.packed_operand() : v_cache.operand();
  p.seqlen_k = c.capacity;
  p.total_k = c.sequences() * p.seqlen_k;
  if (c.packed) p.cu_seqlens_k = cu_seqlens_k_.data();
  if (!c.packed || packed_k) p.seqused_k = case_.cached.data();
  p.leftpad_k = case_.leftpad.data();
  if (c.other_row) p.cache_batch_idx = batch_idx_.data();
  if (pages_ > 0) p.block_table = block_table_.data();
  p.block_table_batch_stride = pages_;
  p.page_size = c.page_size;
  p.rotary_cos = cos.data();
  p.rotary_sin = sin.data();
  p.rotary_cos_row_stride = cos.stride(2);
  p.rotary_sin_row_stride = sin.stride(2);
  p.rotary_dim = c.rotary_dim;
  p.is_rotary_interleaved = c.interleaved;
  if (c.appended == 0) return;
  p.knew = k_new.operand();
  p.vnew = v_new.operand();
  p.seqlen_knew = c.appended;
}

flash::Flash_fwd_params CacheProblem::params() {
  const CacheCase& c = case_;
  flash::Flash_fwd_params p;
  p.q = c.packed ? q.packed_operand() : q.operand();
  p.o = c.packed ? out.packed_operand() : out.operand();
  p.dtype = p.kv_dtype = p.o_dtype = c.dtype;
  p.b = c.sequences();
  p.h = c.h;
  p.h_k = c.h_k;
  p.d = c.d;
  p.d_v = c.d_v;
  p.seqlen_q = *std::max_element(c.seqlens_q.begin(), c.seqlens_q.end());
  p.total_q = sum(c.seqlens_q);
  if (c.packed) p.cu_seqlens_q = cu_seqlens_q_.data();
  p.softmax_lse = lse.floats();
  p.lse_batch_stride = c.packed ? 0 : lse.stride(1);
  p.lse_head_stride = lse.stride(2);
  p.scale_softmax = static_cast<float>(1 / std::sqrt(c.d));
  p.softcap = static_cast<float>(c.softcap);
  p.window_left = c.left;
  p.window_right = c.right;
  if (c.has_alibi) p.alibi_slopes = slopes.floats();
  if (c.has_sink) p.s_aux = sink.data();
  p.s_aux_dtype = sink.dtype();
  p.num_splits = c.num_splits;
  set_cache(p);
  return p;
}

void CacheProblem::run(const flash::cpu::Kernels& kernels) { kernels.mha_fwd(params()); }

// RoFormer: pair m turns by the angle of (position, m). Pairs are neighbours, or halves apart.
template <class Row>
double CacheProblem::rotated(Row row, int dim, int position) const {
  if (dim >= case_.rotary_dim) return row(dim);
  const int half = case_.rotary_dim / 2;
  const int pair = case_.interleaved ? dim / 2 : dim % half;
  const bool second = case_.interleaved ? dim % 2 : dim >= half;
  const double c = cos.get({0, 0, position, pair}), s = sin.get({0, 0, position, pair});
  const double x = row(case_.interleaved ? 2 * pair : pair);
  const double y = row(case_.interleaved ? 2 * pair + 1 : pair + half);
  return second ? x * s + y * c : x * c - y * s;
}

PoisonTensor CacheProblem::expected_cache(const PoisonTensor& cache, const PoisonTensor& added,
                                          bool rotate) const {
  PoisonTensor result = cache;
  added.for_each([&](const PoisonTensor::Index& i) {
    const int b = static_cast<int>(i[0]), h = static_cast<int>(i[2]), dim = static_cast<int>(i[3]);
    const int position = case_.cached[b] + static_cast<int>(i[1]);
    const auto row = [&](int x) { return added.get({i[0], i[1], i[2], x}); };
    result.set(cache_index(b, position, h, dim), rotate ? rotated(row, dim, position) : row(dim));
  });
  return result;
}

AttentionHead CacheProblem::head(int b, int h) const {
  const CacheCase& c = case_;
  const int h_k = h / (c.h / c.h_k), sq = c.seqlens_q[b];
  const int sk = c.cached[b] + c.appended - c.leftpad[b];
  AttentionHead x;
  x.q = Matrix(sq, c.d);
  x.k = Matrix(sk, c.d);
  x.v = Matrix(sk, c.d_v);
  for (int i = 0; i < sq; ++i) {
    // Without a mask all queries stand at the first new position.
    const int position = c.cached[b] + (c.left >= 0 || c.right >= 0 ? i : 0);
    const auto row = [&](int dim) { return q.get(q_index(b, i, h, dim)); };
    for (int dim = 0; dim < c.d; ++dim) x.q(i, dim) = rotated(row, dim, position);
  }
  for (int j = 0; j < sk; ++j) {
    const int row = c.leftpad[b] + j;
    for (int dim = 0; dim < c.d; ++dim) x.k(j, dim) = k_cache.get(cache_index(b, row, h_k, dim));
    for (int dim = 0; dim < c.d_v; ++dim) x.v(j, dim) = v_cache.get(cache_index(b, row, h_k, dim));
  }
  x.scale = 1 / std::sqrt(c.d);
  x.softcap = c.softcap;
  x.left = c.left;
  x.right = c.right;
  if (c.has_alibi) x.alibi_slope = slopes.get({0, 0, 0, h});
  x.has_sink = c.has_sink;
  x.sink = sink.get({0, 0, 0, h});
  return x;
}

void CacheProblem::expected_outputs(PoisonTensor& expected_out, PoisonTensor& expected_lse) const {
  for (int b = 0; b < case_.sequences(); ++b)
    for (int h = 0; h < case_.h; ++h) {
      const AttentionResult r = attend(head(b, h));
      for (int i = 0; i < case_.seqlens_q[b]; ++i) {
        const PoisonTensor::Index first = q_index(b, i, h, 0);
        expected_lse.set({0, first[0], h, first[1]}, r.lse[i]);
        for (int dim = 0; dim < case_.d_v; ++dim)
          expected_out.set(q_index(b, i, h, dim), r.out(i, dim));
      }
    }
}

}  // namespace flash_test
