// The backward. With xhat = norm(x) and g = dout weight + dout1 weight1,
//
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + what flows into x beside its norm
//
// without mean(g) for RMS norm; a row is read once, stays in the first-level cache as fp32, and is
// written once. Sums over rows are made of chunks of rows, whose sums are added in their order:
// they depend on the shape alone.
#pragma once

#include "layer_norm/cpu/bwd_plain.h"

namespace flash::layer_norm::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kMostChunks = 128, kLeastRowsOfChunk = 16;

FLASH_INLINE int64_t rows_of_chunk(int64_t rows) {
  return std::max((rows + kMostChunks - 1) / kMostChunks, kLeastRowsOfChunk);
}

struct BwdScratch {
  float *xhat, *g, *keep;  // a row each

  BwdScratch(Carver& carver, const BwdParams& p)
      : xhat(carver.take<float>(padded(p.cols))),
        g(carver.take<float>(padded(p.cols))),
        keep(carver.take<float>(p.keep.enabled ? padded(p.cols) : 0)) {}
};

// Sums over the rows of each chunk, [chunks][gradients that are wanted][padded(cols)].
class Partials {
 public:
  explicit Partials(const BwdParams& p) : stride_(padded(p.cols)) {
    for (int i = 0; i < kGradients; ++i) slot_[i] = gradient(p, i).given() ? wanted_++ : -1;
  }
  void set_memory(float* memory) { memory_ = memory; }
  size_t bytes_of_chunk() const { return wanted_ * stride_ * sizeof(float); }
  FLASH_INLINE float* first_of(int64_t chunk) const { return memory_ + chunk * wanted_ * stride_; }
  // Null: not wanted.
  FLASH_INLINE float* of(int64_t chunk, int which) const {
    if (slot_[which] < 0) return nullptr;
    return memory_ + (chunk * wanted_ + slot_[which]) * stride_;
  }

 private:
  float* memory_ = nullptr;
  int64_t stride_;
  int slot_[kGradients];
  int wanted_ = 0;
};

FLASH_INLINE void add_to(float* sums, int64_t i, Vec v) {
  if (sums != nullptr) store(sums + i, load(sums + i) + v);
}

FLASH_INLINE void load_xhat(const BwdParams& p, float* xhat, int64_t row) {
  const float mean = p.mean == nullptr ? 0.f : p.mean[row], rstd = p.rstd[row];
  with_dtype(p.x.dtype, [&]<Dtype T>() {
    const RowIn<T> x{p.x.row(row), 0.f};
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
      store(xhat + i, first_of((load_given(x, i, n) - mean) * rstd, n));
    });
  });
}

// What flows into one of the outputs, and the sums that its weight and bias get of it.
struct OutputGradient {
  const TypedMatrix& dout;
  const float* weight;
  float *dweight, *dbias;
};

// g (+)= dout weight; returns the sums of g and g xhat of this output.
template <bool kFirst>
FLASH_INLINE Totals<2> add_output(float* g, const float* xhat, const OutputGradient& output,
                                  int64_t row, int64_t cols) {
  Totals<2> totals;
  const auto run = [&]<Dtype T>(const auto& add_sums) {
    const RowIn<T> dout{output.dout.row(row), 0.f};
    totals = sum_row<2>(cols, [&](int64_t i, auto n, Vec* sums) {
      const Vec dy = load_given(dout, i, n), x = load(xhat + i);
      add_sums(i, dy, x);
      const Vec v = dy * load(output.weight + i);
      sums[0] += v;
      sums[1] = fma(v, x, sums[1]);
      store(g + i, kFirst ? v : load(g + i) + v);
    });
  };
  with_dtype(output.dout.dtype, [&]<Dtype T>() {
    float *const dweight = output.dweight, *const dbias = output.dbias;
    if (dweight == nullptr || dbias == nullptr) {
      return run.template operator()<T>([&](int64_t i, Vec dy, Vec x) {
        add_to(dweight, i, dy * x);
        add_to(dbias, i, dy);
      });
    }
    run.template operator()<T>([=](int64_t i, Vec dy, Vec x) {
      store(dweight + i, fma(dy, x, load(dweight + i)));
      store(dbias + i, load(dbias + i) + dy);
    });
  });
  return totals;
}

struct Means {
  float g, gx;
};

// g -> dx, which is written to `out` if that is given, on the way.
FLASH_INLINE void through_norm(const BwdParams& p, float* g, const float* xhat, const Means& mean,
                               int64_t row, const TypedMatrix& out) {
  const float rstd = p.rstd[row];
  const auto run = [&](const auto& plus, const auto& write) {
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
      const Vec v = (load(g + i) - mean.g - load(xhat + i) * mean.gx) * rstd;
      const Vec dx = plus(v, i, n);
      store(g + i, dx);
      write(dx, i, n);
    });
  };
  const auto with_write = [&](const auto& plus) {
    if (!out.given()) return run(plus, [](Vec, int64_t, auto) {});
    with_dtype(out.dtype, [&]<Dtype T>() {
      char* const to = out.row(row);
      run(plus, [=](Vec dx, int64_t i, auto n) { store_given<T>(to, i, n, dx); });
    });
  };
  if (!p.dx.given()) return with_write([](Vec v, int64_t, auto) { return v; });
  with_dtype(p.dx.dtype, [&]<Dtype T>() {
    const RowIn<T> dx{p.dx.row(row), 0.f};
    with_write([=](Vec v, int64_t i, auto n) { return v + load_given(dx, i, n); });
  });
}

FLASH_INLINE void add_dcolscale(const BwdParams& p, float* sums, const float* g, int64_t row,
                                const Factors& factors) {
  with_dtype(p.x0.dtype, [&]<Dtype T>() {
    const RowIn<T> x0{p.x0.row(row), 0.f};
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
      add_to(sums, i, load(g + i) * factors.times(load_from(x0, i, n), i));
    });
  });
}

// Whether dx0 is dx.
FLASH_INLINE bool dx0_is_dx(const BwdParams& p) {
  return p.x0_subset == nullptr && !p.keep.enabled && !p.colscale.given() &&
         p.rowscale == nullptr && p.rowscale_const == 1.f;
}

// Which gradient is written as dx is computed.
FLASH_INLINE TypedMatrix first_written(const BwdParams& p) {
  if (p.dresidual.given() || !dx0_is_dx(p)) return p.dresidual;
  return p.dx0;
}

// dx of a row -> gradients of what x is the sum of, but for first_written
inline void write_branches(const BwdParams& p, const Columns& columns, const BwdScratch& scratch,
                           float* dcolscale, int64_t row) {
  const float* keep = p.keep.enabled ? scratch.keep : nullptr;
  if (p.dx1.given()) {
    if (p.keep.enabled) keep_factors(scratch.keep, p.keep, Branch::kX1, row, p.cols);
    write_row(p.dx1, row, scratch.g, {.keep = keep}, p.cols);
  }
  const int64_t x0_row = place_of(p.x0_subset, row);
  if (x0_row < 0 || (dx0_is_dx(p) && !p.dresidual.given())) return;
  if (p.keep.enabled) keep_factors(scratch.keep, p.keep, Branch::kX0, x0_row, p.cols);
  const float scale = scale_of(p, row);
  if (dcolscale != nullptr)
    add_dcolscale(p, dcolscale, scratch.g, x0_row, {.scale = scale, .keep = keep});
  write_row(p.dx0, x0_row, scratch.g, {scale, columns.colscale, keep}, p.cols);
}

FLASH_INLINE void write_output(const BwdParams& p, const Columns& columns, const float* xhat,
                               int64_t row) {
  if (!p.out.given()) return;
  with_dtype(p.out.dtype, [&]<Dtype T>() {
    const RowOut<T> to{p.out.row(row)};
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
      const Vec weight = load(columns.weight + i), bias = load(columns.bias + i);
      store_to(to, i, n, fma(load(xhat + i), weight, bias));
    });
  });
}

inline void bwd_row(const BwdParams& p, const Columns& columns, const BwdScratch& scratch,
                    const Partials& partials, int64_t chunk, int64_t row) {
  const int64_t out_row = place_of(p.out_subset, row);
  if (out_row >= 0) {
    load_xhat(p, scratch.xhat, row);
    write_output(p, columns, scratch.xhat, out_row);
    Totals<2> totals = add_output<true>(
        scratch.g, scratch.xhat,
        {p.dout, columns.weight, partials.of(chunk, kDWeight), partials.of(chunk, kDBias)}, out_row,
        p.cols);
    if (p.dout1.given()) {
      const auto more = add_output<false>(
          scratch.g, scratch.xhat,
          {p.dout1, columns.weight1, partials.of(chunk, kDWeight1), partials.of(chunk, kDBias1)},
          out_row, p.cols);
      for (int k = 0; k < 2; ++k) totals.of[k] += more.of[k];
    }
    const float n = static_cast<float>(p.cols);
    const Means mean{p.is_rms_norm ? 0.f : totals.of[0] / n, totals.of[1] / n};
    through_norm(p, scratch.g, scratch.xhat, mean, row, first_written(p));
  } else {
    std::memset(scratch.g, 0, padded(p.cols) * sizeof(float));
    if (p.dx.given()) add_row<false>(scratch.g, p.dx, row, {}, p.cols);
    write_row(first_written(p), row, scratch.g, {}, p.cols);
  }
  write_branches(p, columns, scratch, partials.of(chunk, kDColscale), row);
}

// Adds up the chunks' sums of some columns.
inline void write_gradient(const BwdParams& p, const Partials& partials, int64_t chunks, int which,
                           int64_t first, int64_t end) {
  const TypedMatrix& to = gradient(p, which);
  if (!to.given()) return;
  with_dtype(to.dtype, [&]<Dtype T>() {
    const RowOut<T> out{to.row(0)};
    for_vectors(first, end, [&](int64_t i, auto n) {
      Vec sum = zero();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(partials.of(chunk, which) + i);
      store_to(out, i, n, sum);
    });
  });
}

inline void layer_norm_bwd(const BwdParams& p) {
  if (p.cols == 0) return;
  const int64_t chunk_rows = rows_of_chunk(p.rows);
  const int64_t chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  const int threads = threads_for_rows(p);
  Carver measure(nullptr);
  const BwdScratch measured(measure, p);
  const size_t shared = columns_bytes(p.cols), own = measure.used();
  Partials partials(p);
  const Scratch memory(shared + own * threads + partials.bytes_of_chunk() * chunks);
  partials.set_memory(reinterpret_cast<float*>(memory.data() + shared + own * threads));
  Carver carver(memory.data());
  const Columns columns = take_columns(carver, p);
  parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
    Carver own_carver(memory.data() + shared + own * thread);
    const BwdScratch scratch(own_carver, p);
    std::memset(reinterpret_cast<char*>(partials.first_of(chunk)), 0, partials.bytes_of_chunk());
    const int64_t first = chunk * chunk_rows, end = std::min(first + chunk_rows, p.rows);
    if (is_plain(p)) {
      float *dweight = partials.of(chunk, kDWeight), *dbias = partials.of(chunk, kDBias);
      // Rows of scratch take sums that are not wanted; they begin as any numbers.
      bwd_plain(p, columns.weight, dweight == nullptr ? scratch.xhat : dweight,
                dbias == nullptr ? scratch.g : dbias, first, end);
      return;
    }
    for (int64_t row = first; row < end; ++row) bwd_row(p, columns, scratch, partials, chunk, row);
  });
  constexpr int64_t kColumns = 512;
  const int64_t pieces = (p.cols + kColumns - 1) / kColumns;
  parallel_for(pieces * kGradients, threads, [&](int64_t task, int) {
    const int64_t first = task / kGradients * kColumns;
    write_gradient(p, partials, chunks, static_cast<int>(task % kGradients), first,
                   std::min(first + kColumns, p.cols));
  });
}

}  // namespace flash::layer_norm::cpu::FLASH_ATTN_ISA
