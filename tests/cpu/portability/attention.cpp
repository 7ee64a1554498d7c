// Attention of one small packed call, forward and backward, against loops in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/isa/kernels.h"

using namespace torchweld;

static float noise() { return static_cast<float>(std::rand()) / RAND_MAX - 0.5f; }

int main() {
  constexpr int H = 2, N = 150, D = 20;
  const int32_t starts[3] = {0, 60, N};
  const int64_t seed = 12345;
  std::vector<float> q(N * H * D), k(q), v(q), out(q), dout(q), dq(q), dk(q), dv(q), lse(H * N);
  for (auto* t : {&q, &k, &v, &dout})
    for (float& x : *t) x = noise();
  AttentionBackwardParams p{};
  p.batch = 2;
  p.heads = p.kv_heads = H;
  p.queries = p.keys = 90;
  p.total_q = p.total_k = N;
  p.dim = p.value_dim = D;
  p.cu_seqlens_q = p.cu_seqlens_k = starts;
  p.dtype = DType::float32;
  p.scale = 0.7f;
  p.left = kUnbounded;
  p.dropout = make_dropout(&seed, 0.25);
  p.query = q.data(), p.key = k.data(), p.value = v.data();
  const Strides strides{0, D, H * D};
  p.query_strides = p.key_strides = p.value_strides = strides;
  AttentionForwardParams f{};
  static_cast<AttentionInputs&>(f) = p;
  f.output = out.data();
  f.output_strides = strides;
  f.lse = lse.data();
  std::vector<float> work(cpu::baseline::attention_forward_workspace(f));
  f.workspace = work.data();
  cpu::baseline::attention_forward(f);
  p.output = out.data(), p.doutput = dout.data(), p.max = lse.data();
  p.dquery = dq.data(), p.dkey = dk.data(), p.dvalue = dv.data();
  p.output_strides = p.doutput_strides = p.dquery_strides = p.dkey_strides = p.dvalue_strides = strides;
  work.resize(cpu::baseline::attention_backward_workspace(p));
  p.workspace = work.data();
  cpu::baseline::attention_backward(p);

  double worst = 0;
  std::vector<double> eq(q.size()), ek(q.size()), ev(q.size());
  auto at = [&](int row, int h, int d) { return (row * H + h) * D + d; };
  for (int s = 0; s < 2; ++s)
    for (int h = 0; h < H; ++h)
      for (int i = starts[s]; i < starts[s + 1]; ++i) {
        std::vector<double> e(N), kept(N), dp(N);
        double total = 0, delta = 0;
        for (int j = starts[s]; j <= i; ++j) {
          double dot = 0;
          for (int d = 0; d < D; ++d) dot += double(q[at(i, h, d)]) * k[at(j, h, d)];
          total += e[j] = std::exp(0.7f * dot);
          const int col = j - starts[s];
          kept[j] = philox::words(seed, h * N + i, col / 4).word[col % 4] < p.dropout.drop ? 0.0 : p.dropout.scale;
        }
        for (int d = 0; d < D; ++d) {
          double o = 0;
          for (int j = starts[s]; j <= i; ++j) o += e[j] / total * kept[j] * v[at(j, h, d)];
          worst = std::fmax(worst, std::fabs(o - out[at(i, h, d)]));
          delta += o * dout[at(i, h, d)];
          for (int j = starts[s]; j <= i; ++j) {
            dp[j] += kept[j] * dout[at(i, h, d)] * v[at(j, h, d)];
            ev[at(j, h, d)] += e[j] / total * kept[j] * dout[at(i, h, d)];
          }
        }
        for (int j = starts[s]; j <= i; ++j)
          for (int d = 0; d < D; ++d) {
            eq[at(i, h, d)] += 0.7f * e[j] / total * (dp[j] - delta) * k[at(j, h, d)];
            ek[at(j, h, d)] += 0.7f * e[j] / total * (dp[j] - delta) * q[at(i, h, d)];
          }
      }
  for (size_t n = 0; n < q.size(); ++n)
    worst = std::fmax(
        worst, std::fmax(std::fabs(eq[n] - dq[n]), std::fmax(std::fabs(ek[n] - dk[n]), std::fabs(ev[n] - dv[n]))));
  std::printf("largest error %.2e\n", worst);
  return worst < 2e-6 ? 0 : 1;
}
