// Softmax attention as a oneDNN graph, behind a C interface for ctypes. Needs oneDNN 3.5 or newer.
//
// The graph is the pattern that oneDNN documents as "Scaled Dot-Product Attention (SDPA)":
// MatMul, Multiply by the scale, Add of a mask, SoftMax, MatMul. onednn_sdpa_create fails
// unless oneDNN fuses it into one partition.

#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "oneapi/dnnl/dnnl_graph.hpp"

namespace {

namespace graph = dnnl::graph;
using graph::logical_tensor;
using graph::op;
using Dims = logical_tensor::dims;

enum Port : size_t { kQuery, kKey, kValue, kMask, kScale, kScores, kScaled, kMasked, kProbs, kOut };

struct Shape {
  int64_t batch, heads, seqlen, head_dim;
};

logical_tensor tensor(Port port, logical_tensor::data_type type, const Dims& dims) {
  return {port, type, dims, logical_tensor::layout_type::strided};
}

logical_tensor inner_tensor(Port port) { return {port, logical_tensor::data_type::f32}; }

class Attention {
 public:
  Attention(const Shape& shape, logical_tensor::data_type type, bool masked)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    const Dims rows{shape.batch, shape.heads, shape.seqlen, shape.head_dim};
    const Dims mask{1, 1, shape.seqlen, shape.seqlen};
    inputs_ = {tensor(kQuery, type, rows), tensor(kKey, type, rows),
               tensor(kScale, logical_tensor::data_type::f32, {1}), tensor(kValue, type, rows)};
    if (masked) {
      inputs_.push_back(tensor(kMask, logical_tensor::data_type::f32, mask));
    }
    outputs_ = {tensor(kOut, type, rows)};
    compile(type, masked);
  }

  // Addresses in the order query, key, value, mask (null if the graph has none), out.
  void run(const std::array<void*, 5>& data, float* scale) {
    std::vector<graph::tensor> in;
    for (const logical_tensor& input : partition_.get_input_ports()) {
      void* address = input.get_id() == kScale ? scale : data[input.get_id()];
      in.emplace_back(compiled_.query_logical_tensor(input.get_id()), engine_, address);
    }
    const std::vector<graph::tensor> out{{compiled_.query_logical_tensor(kOut), engine_, data[4]}};
    compiled_.execute(stream_, in, out);
    stream_.wait();
  }

 private:
  void compile(logical_tensor::data_type type, bool masked) {
    const auto& query = inputs_[0];
    const auto scores = inner_tensor(kScores), scaled = inner_tensor(kScaled);
    const auto masked_scores = inner_tensor(kMasked);
    logical_tensor probs(kProbs, type);

    op query_key(0, op::kind::MatMul, {query, inputs_[1]}, {scores}, "query_key");
    query_key.set_attr<bool>(op::attr::transpose_b, true);
    op multiply(1, op::kind::Multiply, {scores, inputs_[2]}, {scaled}, "scale");
    op softmax(2, op::kind::SoftMax, {masked ? masked_scores : scaled}, {probs}, "softmax");
    softmax.set_attr<int64_t>(op::attr::axis, -1);
    softmax.set_attr<std::string>(op::attr::mode, "inf_as_zero");
    op probs_value(3, op::kind::MatMul, {probs, inputs_[3]}, {outputs_[0]}, "probs_value");

    graph::graph whole(dnnl::engine::kind::cpu);
    whole.add_op(query_key);
    whole.add_op(multiply);
    if (masked) {
      whole.add_op(op(4, op::kind::Add, {scaled, inputs_[4]}, {masked_scores}, "mask"));
    }
    whole.add_op(softmax);
    whole.add_op(probs_value);
    whole.finalize();
    const auto partitions = whole.get_partitions();
    if (partitions.size() != 1 || !partitions[0].is_supported()) {
      throw std::runtime_error("not fused for this dtype on this CPU");
    }
    partition_ = partitions[0];
    compiled_ = partition_.compile(inputs_in_order(), outputs_, engine_);
  }

  std::vector<logical_tensor> inputs_in_order() const {
    std::vector<logical_tensor> ordered;
    for (const logical_tensor& port : partition_.get_input_ports()) {
      for (const logical_tensor& input : inputs_) {
        if (input.get_id() == port.get_id()) ordered.push_back(input);
      }
    }
    return ordered;
  }

  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<logical_tensor> inputs_, outputs_;
  graph::partition partition_;
  graph::compiled_partition compiled_;
};

thread_local std::string last_error;

}  // namespace

extern "C" {

// Why the last call of this thread failed.
const char* onednn_error() { return last_error.c_str(); }

// dtype: 0 fp32, 1 bf16, 2 fp16; all tensors (batch, heads, seqlen, head_dim), dense. With masked,
// run wants an additive fp32 mask (seqlen, seqlen). Returns null on failure.
void* onednn_sdpa_create(const int64_t* shape, int dtype, bool masked) {
  constexpr std::array kTypes{logical_tensor::data_type::f32, logical_tensor::data_type::bf16,
                              logical_tensor::data_type::f16};
  try {
    return new Attention({shape[0], shape[1], shape[2], shape[3]}, kTypes.at(dtype), masked);
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

// Addresses of query, key, value, mask (null if the graph has none) and out. Returns 1 on failure.
int onednn_sdpa_run(void* attention, void* const* data, float scale) {
  try {
    static_cast<Attention*>(attention)->run({data[0], data[1], data[2], data[3], data[4]}, &scale);
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

void onednn_sdpa_destroy(void* attention) { delete static_cast<Attention*>(attention); }

const char* onednn_version() {
  static const std::string text = [] {
    const dnnl_version_t* v = dnnl_version();
    return std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
           std::to_string(v->patch);
  }();
  return text.c_str();
}

}  // extern "C"
