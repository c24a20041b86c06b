// The C interface: check, choose where to run, run.
#include "flash_attn/rotary.h"

#include <array>
#include <limits>

#include "base/call/guarded.h"
#include "base/call/matrix.h"
#include "base/call/target.h"
#include "base/cpu/isa_units.h"
#include "rotary/cpu/kernels.h"
#include "rotary/positions.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "rotary/sm80/launch.h"
#endif

namespace flash::rotary {
namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max();

auto written_by(const flash_attn_rotary_args& a) {
  return std::array{Region{"out", a.out}, Region{"k_out", a.k_out}};
}
auto read_by(const flash_attn_rotary_args& a) {
  return std::array{Region{"x", a.x},
                    Region{"cos", a.cos},
                    Region{"sin", a.sin},
                    Region{"k", a.k},
                    Region{"cos_k", a.cos_k},
                    Region{"sin_k", a.sin_k},
                    Region{"seqlen_offsets", a.seqlen_offsets},
                    Region{"cu_seqlens", a.cu_seqlens}};
}

// Of a view that has been checked.
Tokens tokens_of(const Arg& x) {
  check_last_stride(x, "heads must have contiguous elements");
  if (x.t->ndim == 3) return {x.t->data, 0, x.stride(0), x.stride(1)};
  return {x.t->data, x.stride(0), x.stride(1), x.stride(2)};
}

// Has the extents of `like`, but as many heads as it likes.
void check_tokens(const Arg& x, const Arg& like, bool is_packed) {
  require(x.given(), x.name, " must be given");
  check_view(x, like.t->ndim, is_packed ? "(total, nheads, d)" : "(batch, seqlen, nheads, d)");
  check_device(x, like);
  check_dtype_of_q(x, like, "what is turned must have one dtype");
  if (is_packed) {
    check_extents(x, {{"total", like.size(0)}, {"nheads", x.size(1)}, {"d", like.size(2)}});
  } else {
    check_extents(x, {{"batch", like.size(0)},
                      {"seqlen", like.size(1)},
                      {"nheads", x.size(2)},
                      {"d", like.size(3)}});
  }
}

Matrix check_table(const Arg& table, const Arg& cos, const Arg& x) {
  check_device(table, x);
  check_dtype_of_q(table, cos, "cos and sin must have one dtype");
  check_shape(table, {{"seqlen_ro", cos.size(0)}, {"rotary_dim / 2", cos.size(1)}});
  return check_matrix(table);
}

Turned check_turned(const Arg& x, const Arg& out, bool is_packed) {
  check_tokens(out, x, is_packed);
  const int64_t heads = x.size(x.t->ndim - 2);
  require(out.size(out.t->ndim - 2) == heads, out.name, " must have ", heads, " heads, as ", x.name,
          " has, got ", out.size(out.t->ndim - 2));
  require(heads <= kMost, x.name, " has too many heads: ", heads);
  Turned turned{};
  turned.in = tokens_of(x);
  turned.out = tokens_of(out);
  turned.heads = static_cast<int>(heads);
  turned.in_place = turned.in.ptr == turned.out.ptr;
  return turned;
}

Indices check_indices(const Arg& x, const Arg& like, Dim dim) {
  if (!x.given()) return {};
  require(x.t->dtype == FLASH_ATTN_INT32 || x.t->dtype == FLASH_ATTN_INT64, x.name,
          " must have dtype int32 or int64, got ", dtype_name(x));
  check_device(x, like);
  check_shape(x, {dim});
  require(is_contiguous(x), x.name, " must be contiguous");
  return {x.t->data, x.t->dtype == FLASH_ATTN_INT64};
}

void check_positions(const flash_attn_rotary_args& a, Params& p) {
  const Arg x{"x", a.x}, cu{"cu_seqlens", a.cu_seqlens};
  p.sequences = p.batch;
  if (cu.given()) {
    check_view(cu, 1, "(batch + 1,)");
    require(cu.size(0) > 0, "cu_seqlens must have an element more than there are sequences");
    p.sequences = cu.size(0) - 1;
    p.cu_seqlens = check_indices(cu, x, {"batch + 1", p.sequences + 1});
    p.max_seqlen = a.max_seqlen;
    require(p.max_seqlen >= 0, "max_seqlen must not be negative, got ", p.max_seqlen);
  }
  p.seqlen_offsets = check_indices({"seqlen_offsets", a.seqlen_offsets}, x, {"batch", p.sequences});
  if (p.seqlen_offsets.ptr != nullptr || a.seqlen_offsets != nullptr) return;
  p.seqlen_offset = a.seqlen_offset;
  const int64_t length = cu.given() ? p.max_seqlen : p.seqlen;
  require(p.seqlen_offset >= 0 && p.seqlen_offset <= p.table_rows - length, "positions ",
          p.seqlen_offset, " to ", p.seqlen_offset, " + ", length,
          " - 1 exceed cos and sin, which have ", p.table_rows, " rows");
}

void check_tables(const flash_attn_rotary_args& a, Params& p) {
  const Arg x{"x", a.x}, cos{"cos", a.cos};
  check_view(cos, 2, "(seqlen_ro, rotary_dim / 2)");
  p.table_dtype = check_float_dtype(cos, "cos must have x's dtype or fp32");
  require(p.table_dtype == p.dtype || p.table_dtype == Dtype::kFloat32,
          "cos must have x's dtype or fp32: x has ", dtype_name(x), ", cos ", dtype_name(cos));
  require(cos.size(1) <= p.head_dim / 2, "rotary_dim ", 2 * cos.size(1), " exceeds the head dim ",
          p.head_dim, ": it is twice the columns of cos and sin");
  p.rotary_dim = static_cast<int>(2 * cos.size(1));
  p.table_rows = cos.size(0);
  p.q.cos = check_table(cos, cos, x);
  p.q.sin = check_table({"sin", a.sin}, cos, x);
  p.k.cos = a.cos_k == nullptr ? p.q.cos : check_table({"cos_k", a.cos_k}, cos, x);
  p.k.sin = a.sin_k == nullptr ? p.q.sin : check_table({"sin_k", a.sin_k}, cos, x);
}

Params check(const flash_attn_rotary_args& a) {
  const Arg x{"x", a.x}, k{"k", a.k};
  const bool is_packed = a.cu_seqlens != nullptr;
  require(x.given(), "x must be given");
  check_view(x, is_packed ? 3 : 4, is_packed ? "(total, nheads, d)" : "(batch, seqlen, nheads, d)");
  check_device_of_q(x);
  Params p{};
  p.dtype = check_float_dtype(x, "rotary embedding takes fp16, bf16 and fp32");
  p.batch = is_packed ? 1 : x.size(0);
  p.seqlen = x.size(is_packed ? 0 : 1);
  const int64_t head_dim = x.size(x.t->ndim - 1);
  require(head_dim <= kMost, "x has too large a head dim: ", head_dim);
  require(p.batch <= kMost && p.seqlen <= kMost / std::max<int64_t>(p.batch, 1),
          "x has too many tokens");
  p.head_dim = static_cast<int>(head_dim);
  p.q = check_turned(x, {"out", a.out}, is_packed);
  require(k.given() || a.k_out == nullptr, "k_out must be given where k is, and only there");
  if (k.given()) {
    check_tokens(k, x, is_packed);
    p.k = check_turned(k, {"k_out", a.k_out}, is_packed);
  }
  check_tables(a, p);
  check_positions(a, p);
  p.interleaved = a.interleaved != 0;
  p.conjugate = a.conjugate != 0;
  check_written(written_by(a), read_by(a));
  return p;
}

// Where the host can read them.
void check_index_tensors(const Params& p) {
  for (int64_t i = 0; i < p.sequences; ++i) {
    const Sequence s = sequence(p, i);
    if (!s.fits) [[unlikely]]
      fail("cu_seqlens must ascend from 0 to at most the ", p.seqlen,
           " tokens of x, in steps of at most max_seqlen = ", p.max_seqlen, ": sequence ", i,
           " is from ", p.cu_seqlens[i], " to ", p.cu_seqlens[i + 1]);
    require(s.has_rows, "seqlen_offsets: a position is out of range of cos and sin, which have ",
            p.table_rows, " rows: sequence ", i, " has ", s.length, " tokens from position ",
            s.offset, " on");
  }
}

#if defined(FLASH_ATTN_HAVE_CUDA)
constexpr auto kCuda = sm80::turn;
#else
constexpr void (*kCuda)(const Params&, const Target&) = nullptr;
#endif

void run(const flash_attn_rotary_args& args) {
  const Params p = check(args);
  const Target target = target_of(*args.x, args.stream);
  if (target.device_type == FLASH_ATTN_CPU) {
    check_index_tensors(p);
    return FLASH_CURRENT_UNIT(cpu::kernels).turn(p);
  }
  require_cuda_kernels(target);
  run_kernels(target, written_by(args), read_by(args), {}, [&] { kCuda(p, target); });
}

}  // namespace
}  // namespace flash::rotary

flash_attn_status flash_attn_rotary(const flash_attn_rotary_args* args) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    flash::rotary::run(*args);
  });
}
