// What the checks make of valid calls, and which kernel serves them.
#include "api/select_kernel.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "api/check.h"
#include "api/run.h"
#include "api_calls.h"

namespace flash_test {
namespace {

using flash::check_mha_bwd;
using flash::check_mha_fwd;
using flash::check_mha_varlen_bwd;
using flash::check_mha_varlen_fwd;

TEST(Params, DenseForward) {
  FwdCall c = make_fwd();
  c.args.num_splits = 3;
  const flash::Flash_fwd_params p = check_mha_fwd(c.args);
  EXPECT_EQ(p.b, kBatch);
  EXPECT_EQ(p.h, kHeads);
  EXPECT_EQ(p.h_k, kHeadsK);
  EXPECT_EQ(p.d, kDim);
  EXPECT_EQ(p.d_v, kDimV);
  EXPECT_EQ(p.seqlen_q, kSq);
  EXPECT_EQ(p.seqlen_k, kSk);
  EXPECT_EQ(p.seqlen_k_rounded, 128);
  EXPECT_EQ(p.q.batch_stride, kSq * kHeads * kDim);
  EXPECT_EQ(p.q.row_stride, kHeads * kDim);
  EXPECT_EQ(p.q.head_stride, kDim);
  EXPECT_EQ(p.o.head_stride, kDimV);
  EXPECT_EQ(p.lse_batch_stride, kHeads * kSq);
  EXPECT_EQ(p.lse_head_stride, kSq);
  EXPECT_EQ(p.alibi_batch_stride, kHeads);
  EXPECT_EQ(p.s_aux_dtype, flash::Dtype::kBFloat16);
  EXPECT_EQ(p.bias.batch_stride, kSq * kSk);
  EXPECT_EQ(p.bias.head_stride, 0);
  EXPECT_EQ(p.bias.h, 1);
  EXPECT_EQ(p.bias.col_stride, 1);
  EXPECT_EQ(p.num_splits, 3);
  EXPECT_FLOAT_EQ(p.p_dropout, 0.25f);
}

TEST(Params, VarlenForwardCountsFromThePackedStart) {
  FwdCall c = make_varlen_fwd();
  const flash::Flash_fwd_params p = check_mha_varlen_fwd(c.args);
  EXPECT_EQ(p.b, kBatch);
  EXPECT_EQ(p.q.batch_stride, 0);
  EXPECT_EQ(p.q.row_stride, kHeads * kDim);
  EXPECT_EQ(p.lse_batch_stride, 0);
  EXPECT_EQ(p.lse_head_stride, kSq);
  EXPECT_EQ(p.total_q, kSq);
  EXPECT_EQ(p.total_k, kSk);
  EXPECT_EQ(p.seqlen_q, 3);
  EXPECT_EQ(p.seqlen_k, 3);  // seqused_k leaves 3 and 2
}

TEST(Params, MaxSeqlenMayExceedEverySequence) {
  FwdCall c = make_varlen_fwd();
  c.args.score.attn_bias = nullptr;
  c.args.s_dmask = nullptr;
  c.args.max_seqlen_q = c.args.max_seqlen_k = INT32_MAX;
  EXPECT_EQ(check_mha_varlen_fwd(c.args).seqlen_q, 3);
}

TEST(Params, Backward) {
  BwdCall c = make_bwd();
  const flash::Flash_bwd_params p = check_mha_bwd(c.args);
  EXPECT_EQ(p.dsoftmax_batch_stride, kHeads * 128);
  EXPECT_EQ(p.dsoftmax_head_stride, 128);
  EXPECT_EQ(p.dlse_batch_stride, kHeads * kSq);
  EXPECT_EQ(p.dlse_row_stride, 1);
  EXPECT_EQ(p.dbias.head_stride, 0);
  EXPECT_EQ(p.dbias.rows, kSq);
  EXPECT_EQ(p.dk.row_stride, kHeadsK * kDim);

  BwdCall varlen = make_varlen_bwd();
  const flash::Flash_bwd_params pv = check_mha_varlen_bwd(varlen.args);
  EXPECT_EQ(pv.dsoftmax_batch_stride, 0);
  EXPECT_EQ(pv.dsoftmax_head_stride, kSq + 256);
  EXPECT_EQ(pv.dlse_head_stride, kSq);
  EXPECT_EQ(pv.dv.batch_stride, 0);
}

TEST(Params, GradientsMayBeInterleaved) {
  BwdCall c;
  c = make_bwd();
  flash_attn_tensor* packed = c.add("dkv", kFp32, {kBatch, kSk, 2, kHeadsK, kDim});
  for (const char* name : {"v", "dk", "dv", "out", "dout"}) {
    c[name].shape[3] = kDim;
  }
  for (const char* name : {"v", "out", "dout"}) {
    flash_attn_tensor& t = c[name];
    t = *c.add(std::string(name) + " of equal dims", kFp32,
               {t.shape[0], t.shape[1], t.shape[2], t.shape[3]});
  }
  for (const char* name : {"dk", "dv"}) {
    flash_attn_tensor& t = c[name];
    t.stride[0] = packed->stride[0];
    t.stride[1] = packed->stride[1];
    t.stride[2] = packed->stride[3];
  }
  c["dk"].data = packed->data;
  c["dv"].data = static_cast<float*>(packed->data) + packed->stride[2];
  EXPECT_EQ(check_mha_bwd(c.args).dv.row_stride, 2 * kHeadsK * kDim);
}

struct WindowCase {
  int64_t seqlen_q, seqlen_k;
  int is_causal;
  int64_t left, right;
  int64_t expected_left, expected_right;
};

TEST(Params, WindowsThatHideNothingAreNone) {
  const WindowCase cases[] = {
      {5, 7, 0, -1, -1, -1, -1},      {5, 7, 0, -9, -9, -1, -1},
      {5, 7, 0, 3, 2, 3, 2},          {5, 7, 0, 7, 7, -1, -1},
      {5, 7, 0, 6, 6, 6, 6},          {9, 7, 0, 7, 8, -1, 8},
      {9, 7, 0, 7, 9, -1, -1},        {5, 7, 1, -1, -1, -1, 0},
      {5, 7, 1, 2, 4, 2, 0},          {1, 7, 1, -1, -1, -1, -1},
      {1, 7, 1, 3, -1, 3, -1},        {5, 7, 0, INT64_MAX, INT64_MAX, -1, -1},
      {5, 7, 0, INT64_MIN, 0, -1, 0},
  };
  for (const WindowCase& w : cases) {
    FwdCall c = make_fwd();
    c.args.score.alibi_slopes = c.args.score.attn_bias = nullptr;
    c["q"].shape[1] = c["out"].shape[1] = c["softmax_lse"].shape[2] = w.seqlen_q;
    c["q"].stride[0] = 0;  // not run: the buffers are too small
    c["out"].stride[0] = c["softmax_lse"].stride[0] = 1000;
    c["softmax_lse"].stride[1] = 100;
    c["k"].shape[1] = c["v"].shape[1] = w.seqlen_k;
    c.args.score.is_causal = w.is_causal;
    c.args.score.window_left = w.left;
    c.args.score.window_right = w.right;
    const flash::Flash_fwd_params p = check_mha_fwd(c.args);
    EXPECT_EQ(p.window_left, w.expected_left) << w.left << " " << w.right;
    EXPECT_EQ(p.window_right, w.expected_right) << w.left << " " << w.right;
  }
}

TEST(Params, EmptyAndBroadcastTensorsAreValid) {
  FwdCall c = make_fwd();
  c.args.score.alibi_slopes = c.args.score.attn_bias = nullptr;
  c["k"].shape[1] = c["v"].shape[1] = 0;
  c["k"].data = c["v"].data = nullptr;
  c["s_dmask"].shape[3] = 0;
  EXPECT_EQ(check_mha_fwd(c.args).seqlen_k, 0);

  FwdCall broadcast = make_fwd();
  broadcast["k"].stride[0] = broadcast["k"].stride[2] = 0;
  broadcast["q"].stride[1] = 0;
  broadcast["attn_bias"].stride[2] = 0;
  EXPECT_EQ(check_mha_fwd(broadcast.args).k.head_stride, 0);
}

TEST(SelectKernel, WhatCudaTensorsLackIsNamed) {
  FwdCall c = make_fwd();
  for (const char* name :
       {"q", "k", "v", "out", "softmax_lse", "s_dmask", "alibi_slopes", "s_aux", "attn_bias"}) {
    c[name].device_type = FLASH_ATTN_CUDA;
  }
  EXPECT_EQ(flash_attn_mha_fwd(&c.args), FLASH_ATTN_UNSUPPORTED);
#if defined(FLASH_ATTN_HAVE_CUDA)
  EXPECT_STREQ(flash_attn_last_error(),
               "the CUDA backend lacks fp32 (in mha_fwd); CPU tensors have it");
#else
  EXPECT_STREQ(flash_attn_last_error(),
               "this build of flash_attn has no CUDA kernels (FLASH_ATTN_CUDA=PYPI pip install . "
               "makes one that has): mha_fwd takes CPU tensors only");
#endif
  EXPECT_TRUE(c.outputs_untouched());
}

TEST(SelectKernel, TableHasEveryOperationOfEveryInstructionSet) {
  std::istringstream isas(flash_attn_cpu_isas());
  const std::string table = flash_attn_kernels();
  long lines = 0;
  for (std::string isa; isas >> isa;) {
    for (const char* operation :
         {"mha_fwd", "mha_varlen_fwd", "mha_bwd", "mha_varlen_bwd", "mha_fwd_kvcache", "combine"}) {
      const bool is_forward = std::string(operation).find("fwd") != std::string::npos;
      const std::string dtypes = is_forward ? "fp16,bf16,fp32,fp8" : "fp16,bf16,fp32";
      const std::string line = "cpu " + isa + " " + operation + " " + dtypes + " 1-576\n";
      EXPECT_NE(table.find(line), std::string::npos) << line << "is missing in\n" << table;
      ++lines;
    }
  }
  EXPECT_GT(lines, 0);
#if defined(FLASH_ATTN_HAVE_CUDA)
  for (const char* line :
       {"mha_fwd fp16,bf16 1-576,v:1-512", "mha_varlen_fwd fp16,bf16 1-576,v:1-512",
        "mha_bwd fp16,bf16 1-256", "mha_varlen_bwd fp16,bf16 1-256",
        "mha_fwd_kvcache fp16,bf16 1-576,v:1-512", "combine fp16,bf16,fp32 1-576"}) {
    EXPECT_NE(table.find(std::string("cuda sm80 ") + line + "\n"), std::string::npos) << table;
    ++lines;
  }
  for (const char* operation : {"mha_fwd", "mha_varlen_fwd", "mha_fwd_kvcache"}) {
    for (const char* rest : {" fp16,bf16 1-576,v:1-512\n", " fp8 1-256\n"}) {
      const std::string line = std::string("cuda sm90 ") + operation + rest;
      EXPECT_NE(table.find(line), std::string::npos) << table;
      ++lines;
    }
  }
  for (const char* operation : {"mha_bwd", "mha_varlen_bwd"}) {
    const std::string line = std::string("cuda sm90 ") + operation + " fp16,bf16 1-256\n";
    EXPECT_NE(table.find(line), std::string::npos) << table;
    ++lines;
  }
#endif
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), lines);
}

TEST(SelectKernel, FollowsTheInstructionSetInUse) {
  std::istringstream isas(flash_attn_cpu_isas());
  for (std::string isa; isas >> isa;) {
    ASSERT_EQ(flash_attn_set_cpu_isa(isa.c_str()), FLASH_ATTN_OK);
    EXPECT_EQ(flash_attn_cpu_isa(), isa);
    const flash::Kernel& kernel =
        flash::select_kernel({flash::Operation::kMhaBwd, {}, flash::Dtype::kFloat16, 576, 576});
    EXPECT_EQ(kernel.isa, isa);
  }
  EXPECT_EQ(flash_attn_set_cpu_isa("sse9"), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_attn_last_error()).find("\"sse9\" is not available"),
            std::string::npos);
  EXPECT_EQ(flash_attn_set_cpu_isa(nullptr), FLASH_ATTN_OK);
}

// A dense fp16 forward with rows of 16-byte pieces.
FwdCall make_mappable_fwd() {
  FwdCall c;
  set_score(&c.args.score);
  c.args.q = c.add("q", FLASH_ATTN_FLOAT16, {kBatch, kSq, kHeads, 40});
  c.args.k = c.add("k", FLASH_ATTN_FLOAT16, {kBatch, kSk, kHeadsK, 40});
  c.args.v = c.add("v", FLASH_ATTN_FLOAT16, {kBatch, kSk, kHeadsK, 24});
  c.args.out = c.add("out", FLASH_ATTN_FLOAT16, {kBatch, kSq, kHeads, 24});
  return c;
}

bool has_tensor_maps(const FwdCall& c, int compute_capability = 90) {
  flash::Flash_fwd_params p = check_mha_fwd(c.args);
  p.target.compute_capability = compute_capability;
  return flash::request_of(flash::Operation::kMhaFwd, p).has_tensor_maps;
}

TEST(SelectKernel, RequestsTellWhetherTensorMapsDescribeTheirTensors) {
  EXPECT_TRUE(has_tensor_maps(make_mappable_fwd()));
  EXPECT_TRUE(has_tensor_maps(make_mappable_fwd(), 120));
  for (const int without : {0, 80, 89}) EXPECT_FALSE(has_tensor_maps(make_mappable_fwd(), without));
  EXPECT_FALSE(has_tensor_maps(make_fwd()));  // fp32
  for (const char* name : {"q", "k", "v", "out"}) {
    FwdCall shifted = make_mappable_fwd();
    shifted[name].data = static_cast<char*>(shifted[name].data) + 2;
    EXPECT_FALSE(has_tensor_maps(shifted)) << name;
  }
  FwdCall expanded = make_mappable_fwd();
  expanded["k"].stride[0] = 0;
  EXPECT_FALSE(has_tensor_maps(expanded));
  FwdCall one_head = make_mappable_fwd();
  for (const char* name : {"k", "v"}) {
    one_head[name].shape[2] = 1;
    one_head[name].stride[2] = 3;
  }
  EXPECT_TRUE(has_tensor_maps(one_head));
  FwdCall empty = make_mappable_fwd();
  empty["k"].shape[1] = empty["v"].shape[1] = 0;
  EXPECT_FALSE(has_tensor_maps(empty));
}

TEST(SelectKernel, KernelsThatNeedTensorMapsServeOnlyWhatHasThem) {
  const flash::Operation operation = flash::Operation::kMhaFwd;
  flash::Kernel kernel = flash::select_kernel({operation, {}, flash::Dtype::kFloat16, 40, 24});
  const auto serves = [&](bool has_tensor_maps) {
    return flash::serves(kernel,
                         {operation, {}, flash::Dtype::kFloat16, 40, 24, 0, has_tensor_maps});
  };
  EXPECT_FALSE(kernel.needs_tensor_maps);
  EXPECT_TRUE(serves(true));
  EXPECT_TRUE(serves(false));
  kernel.needs_tensor_maps = true;
  EXPECT_TRUE(serves(true));
  EXPECT_FALSE(serves(false));
}

TEST(Calls, ValidOnesSucceed) {
  FwdCall fwd = make_fwd(), varlen = make_varlen_fwd(), paged = make_paged_varlen_fwd();
  EXPECT_EQ(flash_attn_mha_fwd(&fwd.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_varlen_fwd(&varlen.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_varlen_fwd(&paged.args), FLASH_ATTN_OK) << flash_attn_last_error();
  BwdCall bwd = make_bwd(), varlen_bwd = make_varlen_bwd();
  EXPECT_EQ(flash_attn_mha_bwd(&bwd.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_varlen_bwd(&varlen_bwd.args), FLASH_ATTN_OK) << flash_attn_last_error();
  KvcacheCall cache = make_kvcache(), pages = make_paged_kvcache();
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&cache.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&pages.args), FLASH_ATTN_OK) << flash_attn_last_error();
  CombineCall combine = make_combine();
  EXPECT_EQ(flash_attn_combine(&combine.args), FLASH_ATTN_OK) << flash_attn_last_error();
}

flash::Workspace seen;

TEST(Calls, KernelsGetTheWorkspaceThatTheyAskFor) {
  const flash::Kernel kernel{
      .operation = flash::Operation::kMhaFwd,
      .device_type = FLASH_ATTN_CPU,
      .backend = "test",
      .isa = "test",
      .dtypes = 0,
      .max_d = 0,
      .max_d_v = 0,
      .features = 0,
      .mha_fwd = [](const flash::Flash_fwd_params& p) { seen = p.workspace; },
      .fwd_workspace_bytes = [](const flash::Flash_fwd_params& p) { return size_t(100 * p.b); }};
  FwdCall c = make_fwd();
  flash::Flash_fwd_params p = check_mha_fwd(c.args);
  char memory[100 * kBatch + 1];
  c.args.workspace = memory;
  c.args.workspace_bytes = sizeof(memory);
  flash::run(kernel, c.args, p);
  EXPECT_EQ(seen.ptr, memory);
  EXPECT_EQ(seen.bytes, size_t(100 * kBatch));
  c.args.workspace_bytes = 100 * kBatch - 1;
  EXPECT_THROW(flash::run(kernel, c.args, p), flash::ApiError);
  c.args.workspace = nullptr;
  EXPECT_THROW(flash::run(kernel, c.args, p), flash::ApiError);
}

TEST(Calls, WorkspaceSizesAreKnownWithoutRunning) {
  FwdCall fwd = make_fwd(), varlen = make_varlen_fwd();
  BwdCall bwd = make_bwd(), varlen_bwd = make_varlen_bwd();
  KvcacheCall cache = make_kvcache();
  size_t bytes = 1;
  EXPECT_EQ(flash_attn_mha_fwd_workspace_size(&fwd.args, &bytes), FLASH_ATTN_OK);
  EXPECT_EQ(bytes, 0u);  // CPU kernels allocate inside
  EXPECT_EQ(flash_attn_mha_varlen_fwd_workspace_size(&varlen.args, &bytes), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_mha_bwd_workspace_size(&bwd.args, &bytes), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_mha_varlen_bwd_workspace_size(&varlen_bwd.args, &bytes), FLASH_ATTN_OK);
  EXPECT_EQ(flash_attn_mha_fwd_kvcache_workspace_size(&cache.args, &bytes), FLASH_ATTN_OK);
  EXPECT_TRUE(fwd.outputs_untouched() && varlen.outputs_untouched() && bwd.outputs_untouched());
  EXPECT_TRUE(varlen_bwd.outputs_untouched() && cache.outputs_untouched());
  fwd["q"].shape[3] = 9;
  EXPECT_EQ(flash_attn_mha_fwd_workspace_size(&fwd.args, &bytes), FLASH_ATTN_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace flash_test
