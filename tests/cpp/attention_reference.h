// Attention of one query head of one sequence by its definition, in double, with all scores in
// memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flash_test {

// Row-major.
struct Matrix {
  int rows = 0, columns = 0;
  std::vector<double> x;

  Matrix() = default;
  Matrix(int m, int n) : rows(m), columns(n), x(static_cast<size_t>(m) * n, 0.) {}
  double& operator()(int i, int j) { return x[static_cast<size_t>(i) * columns + j]; }
  double operator()(int i, int j) const { return x[static_cast<size_t>(i) * columns + j]; }
};

struct AttentionHead {
  Matrix q, k, v;  // [sq][d], [sk][d], [sk][dv]
  double scale = 1., softcap = 0., alibi_slope = 0.;
  int64_t left = -1, right = -1;
  bool has_sink = false;
  double sink = 0.;
  Matrix bias;  // [sq][sk], or empty
  Matrix keep;  // dropout's factors [sq][sk], 0 or 1 / (1 - p), or empty

  bool sees(int query, int key) const {
    const int64_t distance = int64_t{key} - (query + k.rows - q.rows);
    return (left < 0 || -distance <= left) && (right < 0 || distance <= right);
  }
};

struct AttentionResult {
  Matrix out;               // [sq][dv]
  std::vector<double> lse;  // [sq]
};
AttentionResult attend(const AttentionHead& head);

struct AttentionGradients {
  Matrix dq, dk, dv, dbias;  // dbias [sq][sk]
  std::vector<double> softmax_d;
  double dsink = 0.;
};
AttentionGradients attend_backward(const AttentionHead& head, const Matrix& dout,
                                   const std::vector<double>& dlse);

}  // namespace flash_test
