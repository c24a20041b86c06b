#include "layer_norm/check.h"

#include "base/call/matrix.h"

namespace flash::layer_norm {
namespace {

constexpr const char* kShape = "(rows, cols)";
constexpr const char* kDtypes = "layer norm takes fp16, bf16 and fp32";

TypedMatrix check_typed(const Arg& x, const Arg& like, int64_t rows, int64_t cols) {
  require(x.given(), x.name, " must be given");
  check_device(x, like);
  check_shape(x, {{"rows", rows}, {"cols", cols}});
  const Dtype dtype = check_float_dtype(x, kDtypes);
  return {check_matrix(x), dtype};
}
TypedMatrix check_optional(const Arg& x, const Arg& like, int64_t rows, int64_t cols) {
  return x.given() ? check_typed(x, like, rows, cols) : TypedMatrix{};
}

TypedMatrix check_vector(const Arg& x, const Arg& like, const Dim& extent) {
  check_device(x, like);
  check_shape(x, {extent});
  require(is_contiguous(x), x.name, " must be contiguous");
  return {{x.t->data, 0}, check_float_dtype(x, kDtypes)};
}
TypedMatrix check_columns(const Arg& x, const Arg& like, int64_t cols) {
  return x.given() ? check_vector(x, like, {"cols", cols}) : TypedMatrix{};
}

Matrix check_mask(const Arg& x, const Arg& like, int64_t rows, int64_t cols) {
  if (!x.given()) return {};
  check_device(x, like);
  check_shape(x, {{"rows", rows}, {"cols / 4", (cols + 3) / 4}});
  check_dtype(x, FLASH_ATTN_INT32, "dropout masks must have dtype int32");
  return check_matrix(x);
}

float* check_statistic(const Arg& x, const Arg& like, int64_t rows) {
  if (!x.given()) return nullptr;
  check_fp32(x, like, {{"rows", rows}});
  require(is_contiguous(x), x.name, " must be contiguous");
  return static_cast<float*>(x.t->data);
}

KeepRule check_dropout(double p_dropout, const Arg& rng_state) {
  require(p_dropout >= 0. && p_dropout <= 1., "p_dropout must be from 0 to 1, got ", p_dropout);
  if (p_dropout == 0.) return {};
  require(rng_state.given(), "rng_state must be given when p_dropout > 0.0");
  check_dtype(rng_state, FLASH_ATTN_INT64, "rng_state must have dtype int64");
  require(rng_state.t->device_type == FLASH_ATTN_CPU, "rng_state must be on the CPU");
  check_shape(rng_state, {{"2", 2}});
  require(is_contiguous(rng_state), "rng_state must be contiguous");
  const int64_t* state = static_cast<const int64_t*>(rng_state.t->data);
  return KeepRule::make(p_dropout, static_cast<uint64_t>(state[0]),
                        static_cast<uint64_t>(state[1]));
}

// `like`: a checked matrix of rows rows; `out`: the checked matrix of out_rows rows.
void check_norm(const flash_attn_norm_args& a, const Arg& like, const Arg& out, NormParams& p) {
  if (a.rowscale != nullptr) {
    const TypedMatrix rowscale = check_vector({"rowscale", a.rowscale}, like, {"rows", p.rows});
    p.rowscale = rowscale.ptr;
    p.rowscale_dtype = rowscale.dtype;
  }
  p.rowscale_const = static_cast<float>(a.rowscale_const);
  p.colscale = check_columns({"colscale", a.colscale}, like, p.cols);
  p.x0_subset = check_per_sequence({"x0_subset", a.x0_subset}, like, p.rows);
  p.out_subset = check_per_sequence({"out_subset", a.out_subset}, like, p.rows);
  require(a.x0_subset != nullptr || p.x0_rows == p.rows, "x0 must have ", p.rows, " rows, got ",
          p.x0_rows);
  require(a.out_subset != nullptr || p.out_rows == p.rows, out.name, " must have ", p.rows,
          " rows, got ", p.out_rows);
  p.weight = check_columns({"weight", a.weight}, like, p.cols);
  p.bias = check_columns({"bias", a.bias}, like, p.cols);
  p.weight1 = check_columns({"weight1", a.weight1}, like, p.cols);
  p.bias1 = check_columns({"bias1", a.bias1}, like, p.cols);
  require(a.epsilon >= 0., "epsilon must not be negative, got ", a.epsilon);
  p.epsilon = static_cast<float>(a.epsilon);
  p.is_rms_norm = a.is_rms_norm != 0;
  p.zero_centered_weight = a.zero_centered_weight != 0;
  p.keep = check_dropout(a.p_dropout, {"rng_state", a.rng_state});
}

void check_subset(const int32_t* subset, const char* name, int64_t rows, int64_t targets) {
  if (subset == nullptr) return;
  std::vector<bool> seen(static_cast<size_t>(targets));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = subset[row];
    require(target >= 0 && target <= targets, name, "[", row, "] must be from 0 to ", targets,
            ", got ", target);
    if (target == 0) continue;
    require(!seen[target - 1], name, "[", row, "] names row ", target, " a second time");
    seen[target - 1] = true;
  }
}

// `in_place`: whether a result may lie where an input of its shape does.
void check_overlaps(bool in_place, std::span<const Region> written, std::span<const Region> read) {
  if (in_place) return check_written(written, read);
  for (const Region& out : written)
    if (out.given()) check_no_self_overlap(out);
  check_distinct(written, read);
}

bool in_order(const flash_attn_norm_args& norm) {
  return norm.x0_subset == nullptr && norm.out_subset == nullptr;
}

std::vector<Region> read_by(const flash_attn_norm_args& a) {
  return {{"rowscale", a.rowscale},     {"colscale", a.colscale}, {"x0_subset", a.x0_subset},
          {"out_subset", a.out_subset}, {"weight", a.weight},     {"bias", a.bias},
          {"weight1", a.weight1},       {"bias1", a.bias1}};
}

}  // namespace

std::vector<Region> written_by(const flash_attn_layer_norm_fwd_args& a) {
  return {{"out", a.out},
          {"out1", a.out1},
          {"x", a.x},
          {"dropout_mask", a.dropout_mask},
          {"dropout_mask1", a.dropout_mask1},
          {"mean", a.mean},
          {"rstd", a.rstd}};
}
std::vector<Region> read_by(const flash_attn_layer_norm_fwd_args& a) {
  std::vector<Region> read = read_by(a.norm);
  for (const Arg& x : {Arg{"x0", a.x0}, Arg{"x1", a.x1}, Arg{"residual", a.residual}})
    read.emplace_back(x);
  return read;
}
std::vector<Region> written_by(const flash_attn_layer_norm_bwd_args& a) {
  return {{"dx0", a.dx0},
          {"dx1", a.dx1},
          {"dresidual", a.dresidual},
          {"dweight", a.dweight},
          {"dbias", a.dbias},
          {"dweight1", a.dweight1},
          {"dbias1", a.dbias1},
          {"dcolscale", a.dcolscale},
          {"out", a.out}};
}
std::vector<Region> read_by(const flash_attn_layer_norm_bwd_args& a) {
  std::vector<Region> read = read_by(a.norm);
  for (const Arg& x : {Arg{"x", a.x}, Arg{"dout", a.dout}, Arg{"dout1", a.dout1}, Arg{"dx", a.dx},
                       Arg{"x0", a.x0}, Arg{"mean", a.mean}, Arg{"rstd", a.rstd}})
    read.emplace_back(x);
  return read;
}

FwdParams check(const flash_attn_layer_norm_fwd_args& a) {
  const Arg x0{"x0", a.x0}, out{"out", a.out};
  check_view(x0, 2, kShape);
  check_device_of_q(x0);
  check_view(out, 2, kShape);
  const Arg of_rows[] = {
      {"x1", a.x1}, {"residual", a.residual}, {"x0_subset", a.norm.x0_subset}, x0};
  FwdParams p{};
  for (const Arg& x : of_rows) {
    if (!x.given()) continue;
    require(x.t->ndim > 0, x.name, " must have dimensions");
    p.rows = x.size(0);
    break;
  }
  p.cols = x0.size(1);
  p.x0_rows = x0.size(0);
  p.out_rows = out.size(0);
  p.x0 = check_typed(x0, x0, p.x0_rows, p.cols);
  check_norm(a.norm, x0, out, p);
  p.x1 = check_optional({"x1", a.x1}, x0, p.rows, p.cols);
  p.residual = check_optional({"residual", a.residual}, x0, p.rows, p.cols);
  p.out = check_typed(out, x0, p.out_rows, p.cols);
  p.out1 = check_optional({"out1", a.out1}, x0, p.out_rows, p.cols);
  p.x = check_optional({"x", a.x}, x0, p.rows, p.cols);
  p.x_dtype = p.x.given() ? p.x.dtype : p.residual.given() ? p.residual.dtype : p.x0.dtype;
  p.mask = check_mask({"dropout_mask", a.dropout_mask}, x0, p.x0_rows, p.cols);
  p.mask1 = check_mask({"dropout_mask1", a.dropout_mask1}, x0, p.rows, p.cols);
  require(p.keep.enabled || (a.dropout_mask == nullptr && a.dropout_mask1 == nullptr),
          "dropout masks are made where p_dropout > 0.0");
  require(a.x1 != nullptr || a.dropout_mask1 == nullptr, "dropout_mask1 is made where x1 is given");
  p.mean = check_statistic({"mean", a.mean}, x0, p.rows);
  p.rstd = check_statistic({"rstd", a.rstd}, x0, p.rows);
  check_overlaps(in_order(a.norm), written_by(a), read_by(a));
  return p;
}

BwdParams check(const flash_attn_layer_norm_bwd_args& a) {
  const Arg x{"x", a.x}, dout{"dout", a.dout}, x0{"x0", a.x0}, dx0{"dx0", a.dx0};
  check_view(x, 2, kShape);
  check_device_of_q(x);
  check_view(dout, 2, kShape);
  BwdParams p{};
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.out_rows = dout.size(0);
  p.x0_rows = p.rows;
  for (const Arg& like_x0 : {x0, dx0}) {
    if (!like_x0.given()) continue;
    check_view(like_x0, 2, kShape);
    p.x0_rows = like_x0.size(0);
  }
  p.x = check_typed(x, x, p.rows, p.cols);
  check_norm(a.norm, x, dout, p);
  p.dout = check_typed(dout, x, p.out_rows, p.cols);
  p.dout1 = check_optional({"dout1", a.dout1}, x, p.out_rows, p.cols);
  p.dx = check_optional({"dx", a.dx}, x, p.rows, p.cols);
  p.x0 = check_optional(x0, x, p.x0_rows, p.cols);
  p.mean = check_statistic({"mean", a.mean}, x, p.rows);
  p.rstd = check_statistic({"rstd", a.rstd}, x, p.rows);
  require(a.rstd != nullptr, "rstd must be given");
  require((a.mean == nullptr) == p.is_rms_norm, "mean must be given, but for RMS norm");
  p.dx0 = check_optional(dx0, x, p.x0_rows, p.cols);
  p.dx1 = check_optional({"dx1", a.dx1}, x, p.rows, p.cols);
  p.dresidual = check_optional({"dresidual", a.dresidual}, x, p.rows, p.cols);
  p.out = check_optional({"out", a.out}, x, p.out_rows, p.cols);
  p.dweight = check_columns({"dweight", a.dweight}, x, p.cols);
  p.dbias = check_columns({"dbias", a.dbias}, x, p.cols);
  p.dweight1 = check_columns({"dweight1", a.dweight1}, x, p.cols);
  p.dbias1 = check_columns({"dbias1", a.dbias1}, x, p.cols);
  p.dcolscale = check_columns({"dcolscale", a.dcolscale}, x, p.cols);
  require(!p.dcolscale.given() || x0.given(), "x0 must be given where dcolscale is");
  check_overlaps(in_order(a.norm) && a.dcolscale == nullptr, written_by(a), read_by(a));
  return p;
}

void check_subsets(const NormParams& p) {
  check_subset(p.x0_subset, "x0_subset", p.rows, p.x0_rows);
  check_subset(p.out_subset, "out_subset", p.rows, p.out_rows);
}

}  // namespace flash::layer_norm
