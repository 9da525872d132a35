// Kernels that work on one row of activations: norms, gate, rotation with the cache write, arg-max.
#pragma once
#include <cmath>
#include <limits>

#include "attention.hpp"
#include "vec.hpp"

namespace ds {

// out = w * T(x / rms(x)); the sum of squares is in float. n is a multiple of LANES. out may be x.
template <class T>
inline void rms_norm_row(const T* x, const T* w, T* out, int n, float eps) {
  vf square = {};
  for (int i = 0; i < n; i += LANES) {
    vf a = load(x + i);
    square = fma(a, a, square);
  }
  vf inv = splat(1.0f / std::sqrt(hsum(square) / float(n) + eps));
  for (int i = 0; i < n; i += LANES) store(out + i, load(w + i) * rounded<T>(load(x + i) * inv));
}

// residual = T(residual + x), then the norm of it.
template <class T>
inline void add_rms_norm_row(T* residual, const T* x, const T* w, T* out, int n, float eps) {
  for (int i = 0; i < n; i += LANES) store(residual + i, load(residual + i) + load(x + i));
  rms_norm_row(residual, w, out, n, eps);
}

template <class T>
DS_INLINE vf gated(vf gate, vf up) {  // rounded where a model in T rounds
  return rounded<T>(silu(rounded<T>(gate))) * rounded<T>(up);
}

template <class T>
inline void silu_mul_row(const T* gate_up, T* out, int n) {
  for (int i = 0; i < n; i += LANES) store(out + i, gated<T>(load(gate_up + i), load(gate_up + n + i)));
}

// Rotate-half in place: pairs (i, i + D/2) by the angle of position p.
template <class T>
inline void rotate(T* x, const float* cos, const float* sin, int dim) {
  int half = dim / 2, i = 0;
  for (; i + LANES <= half; i += LANES) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, fma(a, c, -(b * s)));
    store(x + half + i, fma(b, c, a * s));
  }
  for (; i < half; i++) {
    float a = widen(x[i]), b = widen(x[half + i]);
    x[i] = narrow<T>(std::fma(a, cos[i], -(b * sin[i])));
    x[half + i] = narrow<T>(std::fma(b, cos[i], a * sin[i]));
  }
}

struct Rope {
  const float *cos, *sin;  // [P, D/2]
};

// Norms and rotates queries and keys of one token in place and writes its key and value into the cache.
template <class T>
inline void rotate_and_store(const Plan& plan, int token, T* qkv, const Rope& rope, const T* q_norm, const T* k_norm,
                             T* k, T* v) {
  const Shape& s = plan.shape;
  const Row& r = plan.rows[plan.token_row[token]];
  const int dim = s.head_dim, position = r.kv_len + token - r.token_start;
  const float *cos = rope.cos + int64_t(position) * (dim / 2), *sin = rope.sin + int64_t(position) * (dim / 2);
  T* x = qkv + int64_t(token) * (s.num_q_heads + 2 * s.num_kv_heads) * dim;
  for (int h = 0; h < s.num_q_heads + s.num_kv_heads; h++) {
    T* head = x + h * dim;
    const T* norm = h < s.num_q_heads ? q_norm : k_norm;
    if (norm) rms_norm_row(head, norm, head, dim, s.norm_eps);
    rotate(head, cos, sin, dim);
  }
  const T *new_k = x + s.num_q_heads * dim, *new_v = new_k + s.num_kv_heads * dim;
  int64_t at = int64_t(r.own_start) + position - r.prefix_len;
  for (int h = 0; h < s.num_kv_heads; h++) {
    int64_t to = (int64_t(h) * s.cache_tokens + at) * dim;
    std::memcpy(k + to, new_k + h * dim, sizeof(T) * dim);
    std::memcpy(v + to, new_v + h * dim, sizeof(T) * dim);
  }
}

// The largest value of a row so far, the best of the others, and the first index of the largest.
struct Top {
  float best = -std::numeric_limits<float>::infinity(), second = best;
  int32_t at = -1;
  bool has_nan = false;

  void add(float y, int64_t index) {
    if (y != y) has_nan = true;
    if (y > best || at < 0) second = best, best = y, at = int32_t(index);
    else if (y > second) second = y;
  }
  void add(const Top& later) {  // of higher indexes
    has_nan |= later.has_nan;
    if (later.at < 0) return;
    if (later.best > best || at < 0) second = vmaximum(best, later.second), best = later.best, at = later.at;
    else second = vmaximum(second, later.best);
  }
  // A NaN gives index -1.
  void write(int64_t* index, float* margin) const {
    *index = has_nan ? -1 : at;
    *margin = has_nan ? std::nanf("") : best - second;
  }

 private:
  static float vmaximum(float a, float b) { return a > b ? a : b; }
};

// Adds x[0 .. n-1], whose indexes begin at `first`.
template <class T>
inline void scan(Top& top, const T* x, int64_t n, int64_t first) {
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    vf a = load(x + i), b = load(x + i + LANES), c = load(x + i + 2 * LANES), d = load(x + i + 3 * LANES);
    vf sum = (a - a) + (b - b) + (c - c) + (d - d);  // NaN where a value is not finite
    bool odd = !(hsum(sum) == 0.0f);
    if (!odd && top.at >= 0 && hmax(vmax(vmax(a, b), vmax(c, d))) <= top.second) continue;
    for (int64_t j = i; j < i + 4 * LANES; j++) top.add(widen(x[j]), first + j);
  }
  for (; i < n; i++) top.add(widen(x[i]), first + i);
}

// First index of the maximum, and how far the best of the others lies below it.
template <class T>
inline void argmax_row(const T* x, int64_t n, int64_t* index, float* margin) {
  Top top;
  scan(top, x, n, 0);
  top.write(index, margin);
}

}  // namespace ds
