// All layers of a decoder in one call: no host work between the kernels.
#pragma once
#include "gemm.hpp"
#include "parallel.hpp"
#include "rows.hpp"

namespace ds {

template <class T>
struct AttentionPhase {
  Attend<T> a;
  Rope rope;
  T *qkv, *k, *v;

  static constexpr int NUM_PHASES = 3;
  void run(Team& team, const T* q_norm, const T* k_norm) const {
    const Plan& plan = a.plan;
    team.share_ranges(plan.num_tokens, [&](int t) { rotate_and_store(plan, t, qkv, rope, q_norm, k_norm, k, v); });
    const int num = int(plan.items.size()), ahead = team.size();
    team.share(num, [&](int i) { a.run(plan.items[i], i + ahead < num ? &plan.items[i + ahead] : nullptr); });
    if (!plan.num_partials) return;
    team.share_ranges(plan.num_tokens, [&](int t) { a.combine(t); });
  }
};

struct LayerArgs {
  const float *qkv, *output, *gate_up, *down;  // packed
  const void *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  const void *input_norm, *mlp_norm, *q_norm, *k_norm;
  void *k, *v;
  int64_t plan;  // index into the plans of a step
};

struct ModelArgs {
  const LayerArgs* layers;
  const float *cos, *sin;
  const void* final_norm;
  int64_t num_layers, hidden, inner, q_width, qkv_width;
  float eps;
};

struct StepArgs {
  const void* const* plans;
  void* x;                   // [T, H], embeddings; overwritten
  const int64_t* keep;       // [N] tokens whose final hidden states are wanted, increasing
  const int32_t* tap_column; // [L + 1], column block of layer k at k + 1, or -1
  void* features;            // [T, taps, H] or null
  void* out;                 // [N, H]
  int64_t num_tokens, num_keep, num_taps;
};

template <class T>
class Step {
 public:
  Step(const ModelArgs& model, const StepArgs& step) : m_(model), s_(step) {
    const int64_t t = s_.num_tokens;
    const int64_t per_token = m_.hidden + m_.qkv_width + m_.q_width + m_.inner;
    T* at = reinterpret_cast<T*>(scratch<2>(size_t(t * per_token) * sizeof(T) / 4 + 64));
    h_ = at, at += t * m_.hidden;
    qkv_ = at, at += t * m_.qkv_width;
    attended_ = at, at += t * m_.q_width;
    act_ = at;
    size_t most = 0;
    for (int64_t l = 0; l < m_.num_layers; l++) {
      const Plan& p = plan(m_.layers[l]);
      size_t need = size_t(p.num_partials) * p.partial_stride();
      most = need > most ? need : most;
    }
    partials_ = scratch<1>(most);
  }

  void run() {
    run_team(s_.num_tokens * m_.hidden * m_.inner > (1 << 17), int(m_.num_layers) * 12 + 4, [&](Team& t) { layers(t); });
  }

 private:
  const Plan& plan(const LayerArgs& l) const { return *static_cast<const Plan*>(s_.plans[l.plan]); }
  T* row(T* base, int64_t i, int64_t width) const { return base + i * width; }

  void product(Team& team, const float* w, const void* bias, int64_t n, int64_t k, const T* x, int64_t m, T* y,
               int64_t ldy, Epilogue how) const {
    ds::product<T>(team, {w, static_cast<const T*>(bias), n, k}, x, m, {y, ldy, how});
  }

  // h = norm(x); the tap of the layer that x is the output of is copied on the way.
  void norm(Team& team, T* x, const void* weight, int64_t tokens, int tap_index, T* h) const {
    const int column = s_.features && tap_index >= 0 ? s_.tap_column[tap_index] : -1;
    team.share_ranges(int(tokens), [&](int t) {
      const T* from = row(x, t, m_.hidden);
      if (column >= 0) {
        T* to = static_cast<T*>(s_.features) + (int64_t(t) * s_.num_taps + column) * m_.hidden;
        std::memcpy(to, from, sizeof(T) * m_.hidden);
      }
      if (h) rms_norm_row(from, static_cast<const T*>(weight), row(h, t, m_.hidden), int(m_.hidden), m_.eps);
    });
  }

  // Rows of the kept tokens to the front; each moves down or stays, so one thread does it in place.
  void compact(Team& team, T* x, T* attended) const {
    team.share(1, [&](int) {
      for (int64_t i = 0; i < s_.num_keep; i++) {
        std::memmove(row(x, i, m_.hidden), row(x, s_.keep[i], m_.hidden), sizeof(T) * m_.hidden);
        if (attended) std::memmove(row(attended, i, m_.q_width), row(attended, s_.keep[i], m_.q_width), sizeof(T) * m_.q_width);
      }
    });
  }

  void layers(Team& team) {
    T* x = static_cast<T*>(s_.x);
    int64_t tokens = s_.num_tokens;
    const bool last_is_tapped = s_.features && s_.tap_column[m_.num_layers] >= 0;
    const bool compacts = s_.num_keep < tokens;
    for (int64_t l = 0; l < m_.num_layers; l++) {
      const LayerArgs& a = m_.layers[l];
      const Plan& p = plan(a);
      norm(team, x, a.input_norm, tokens, int(l), h_);
      product(team, a.qkv, a.qkv_bias, m_.qkv_width, m_.hidden, h_, tokens, qkv_, m_.qkv_width, Epilogue::STORE);
      T *k = static_cast<T*>(a.k), *v = static_cast<T*>(a.v);
      AttentionPhase<T> attention{{p, qkv_, k, v, attended_, partials_}, {m_.cos, m_.sin}, qkv_, k, v};
      attention.run(team, static_cast<const T*>(a.q_norm), static_cast<const T*>(a.k_norm));
      if (l + 1 == m_.num_layers && compacts && !last_is_tapped) {
        compact(team, x, attended_);
        tokens = s_.num_keep;
      }
      product(team, a.output, a.output_bias, m_.hidden, m_.q_width, attended_, tokens, x, m_.hidden, Epilogue::ADD);
      norm(team, x, a.mlp_norm, tokens, -1, h_);
      product(team, a.gate_up, a.gate_up_bias, 2 * m_.inner, m_.hidden, h_, tokens, act_, m_.inner, Epilogue::GATE);
      product(team, a.down, a.down_bias, m_.hidden, m_.inner, act_, tokens, x, m_.hidden, Epilogue::ADD);
    }
    if (last_is_tapped) {
      norm(team, x, nullptr, tokens, int(m_.num_layers), nullptr);
      if (compacts) compact(team, x, nullptr);
    }
    norm(team, x, m_.final_norm, s_.num_keep, -1, static_cast<T*>(s_.out));
  }

  const ModelArgs& m_;
  const StepArgs& s_;
  T *h_, *qkv_, *attended_, *act_;
  float* partials_;
};

}  // namespace ds
