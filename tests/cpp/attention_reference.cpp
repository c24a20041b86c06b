#include "attention_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flash_test {
namespace {

double dot(const Matrix& a, int i, const Matrix& b, int j) {
  double sum = 0.;
  for (int c = 0; c < a.columns; ++c) sum += a(i, c) * b(j, c);
  return sum;
}

// What the softmax sees, and the derivative of the softcap.
struct Score {
  double x, slope;
};
Score score(const AttentionHead& head, int i, int j) {
  Score s{head.scale * dot(head.q, i, head.k, j), 1.};
  if (head.softcap > 0.) {
    const double t = std::tanh(s.x / head.softcap);
    s = {head.softcap * t, 1. - t * t};
  }
  s.x -= head.alibi_slope * std::abs(i + head.k.rows - head.q.rows - j);
  if (!head.bias.x.empty()) s.x += head.bias(i, j);
  return s;
}

struct Probabilities {
  Matrix p, slope;  // [sq][sk], 0 where hidden
  std::vector<double> lse;
};

Probabilities probabilities(const AttentionHead& head) {
  const int sq = head.q.rows, sk = head.k.rows;
  Probabilities r{Matrix(sq, sk), Matrix(sq, sk), std::vector<double>(sq)};
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (int i = 0; i < sq; ++i) {
    double largest = head.has_sink ? head.sink : -kInf;
    for (int j = 0; j < sk; ++j) {
      if (!head.sees(i, j)) continue;
      const Score s = score(head, i, j);
      r.p(i, j) = s.x;
      r.slope(i, j) = s.slope;
      largest = std::max(largest, s.x);
    }
    double sum = head.has_sink ? std::exp(head.sink - largest) : 0.;
    for (int j = 0; j < sk; ++j)
      if (head.sees(i, j)) sum += std::exp(r.p(i, j) - largest);
    r.lse[i] = sum > 0. ? largest + std::log(sum) : kInf;
    for (int j = 0; j < sk; ++j) r.p(i, j) = head.sees(i, j) ? std::exp(r.p(i, j) - r.lse[i]) : 0.;
  }
  return r;
}

double kept(const AttentionHead& head, int i, int j) {
  return head.keep.x.empty() ? 1. : head.keep(i, j);
}

}  // namespace

AttentionResult attend(const AttentionHead& head) {
  Probabilities r = probabilities(head);
  AttentionResult result{Matrix(head.q.rows, head.v.columns), std::move(r.lse)};
  for (int i = 0; i < head.q.rows; ++i)
    for (int j = 0; j < head.k.rows; ++j)
      for (int c = 0; c < head.v.columns; ++c)
        result.out(i, c) += r.p(i, j) * kept(head, i, j) * head.v(j, c);
  return result;
}

AttentionGradients attend_backward(const AttentionHead& head, const Matrix& dout,
                                   const std::vector<double>& dlse) {
  const int sq = head.q.rows, sk = head.k.rows, d = head.q.columns, dv = head.v.columns;
  const Probabilities r = probabilities(head);
  AttentionGradients g{Matrix(sq, d), Matrix(sk, d), Matrix(sk, dv), Matrix(sq, sk), {}, 0.};
  for (int i = 0; i < sq; ++i) {
    std::vector<double> dp(sk);
    double delta = -dlse[i];
    for (int j = 0; j < sk; ++j) {
      dp[j] = kept(head, i, j) * dot(dout, i, head.v, j);
      delta += r.p(i, j) * dp[j];
    }
    g.softmax_d.push_back(delta);
    if (head.has_sink) g.dsink -= std::exp(head.sink - r.lse[i]) * delta;
    for (int j = 0; j < sk; ++j) {
      g.dbias(i, j) = r.p(i, j) * (dp[j] - delta);
      const double ds = head.scale * r.slope(i, j) * g.dbias(i, j);
      for (int c = 0; c < d; ++c) g.dq(i, c) += ds * head.k(j, c);
      for (int c = 0; c < d; ++c) g.dk(j, c) += ds * head.q(i, c);
      for (int c = 0; c < dv; ++c) g.dv(j, c) += r.p(i, j) * kept(head, i, j) * dout(i, c);
    }
  }
  return g;
}

}  // namespace flash_test
