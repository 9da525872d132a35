// Draws with keyed Gumbel noise from rows of logits: arg-max of score + noise over the tokens that survive the cuts.
//
// The noise's bits are those of sampling/noise.py. Where a decision hangs on the last digits of a logarithm, an
// exponential or a sum, which differ between libraries, the row is left undecided and the caller asks the slow path.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "rows.hpp"
#include "vec.hpp"

namespace ds {

typedef uint64_t vq __attribute__((vector_size(REGISTER_BYTES)));  // as many hashes as a register holds
typedef double vd __attribute__((vector_size(REGISTER_BYTES)));
typedef float vd_narrow __attribute__((vector_size(REGISTER_BYTES / 2)));
constexpr int HASHES = REGISTER_BYTES / 8;

constexpr int64_t UNDECIDED = -1;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull, POSITION_STEP = 0xD1342543DE82EF95ull;
constexpr int FRACTION_BITS = 52;
constexpr float MAX_GUMBEL = 36.75f;      // no draw exceeds 36.7369
constexpr double CLOSE_SCORES = 1e-9;     // differences that logarithms of another library could turn around
constexpr double CLOSE_MASSES = 4e-6;     // of the whole mass, which the slow path takes from float32 exponentials
constexpr int CANDIDATE_BLOCK = 64, FIRST_BLOCKS = 192;

struct DrawParams {
  double temperature, top_p, min_p;  // top_p >= 1 and min_p <= 0: no cut
  int64_t top_k;                     // 0: no cut
  int64_t key, position;
  int64_t best;  // arg-max of the row, whose value is finite
};

template <class U>
inline U mix64(U x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

struct Noise {
  uint64_t state;
  Noise(int64_t key, int64_t position) : state(mix64(mix64(uint64_t(key)) + uint64_t(position) * POSITION_STEP)) {}

  uint64_t bits(uint64_t token) const { return mix64(state + token * GOLDEN) >> (64 - FRACTION_BITS); }
  double gumbel(uint64_t token) const { return -std::log(-std::log((double(bits(token)) + 0.5) * 0x1p-52)); }
};

// The best noisy score so far, and whether it is clear of the next.
struct Winner {
  double best = -std::numeric_limits<double>::infinity(), second = best;
  int64_t token = UNDECIDED;
  void add(double noisy, int64_t v) {
    if (noisy > best) second = best, best = noisy, token = v;
    else if (noisy > second) second = noisy;
  }
  int64_t decided() const { return best - second > CLOSE_SCORES ? token : UNDECIDED; }
};

// Over the whole vocabulary. Token v beats the best so far, s, only if -log(u_v) < exp(score_v - s). As -log(u) >= 1 - u,
// that needs 1 - u_v < exp(score_v - s): one exponential and no logarithm for the tokens that cannot win, and not even a
// hash where the largest noise there is would not do. Scores are taken relative to the best one, so that their
// differences are exact to float precision at every temperature; 1 % of slack is far above that.
inline int64_t draw_full(const float* x, int64_t n, const DrawParams& p) {
  const Noise noise(p.key, p.position);
  const float temperature = float(p.temperature), top = x[p.best] / temperature;
  Winner winner;
  auto consider = [&](int64_t v) { winner.add(double(x[v] / temperature) + noise.gumbel(uint64_t(v)), v); };
  consider(p.best);
  vq lane;
  for (int i = 0; i < HASHES; i++) lane[i] = uint64_t(i) * GOLDEN;
  int64_t v = 0;
  for (; v + LANES <= n; v += LANES) {
    const float ahead = float(winner.best - double(top));
    const vf d = load(x + v) / temperature - top - ahead;
    if (!(hmax(d) > -MAX_GUMBEL)) continue;
    const vf limit = exp_neg(select((vi)(d < vf{}), d, vf{})) * 1.01f;
    alignas(64) float gap[LANES];
    for (int i = 0; i < LANES; i += HASHES) {
      const vq bits = mix64(lane + (noise.state + uint64_t(v + i) * GOLDEN)) >> (64 - FRACTION_BITS);
      // 1 + u, by the bits of a double in [1, 2): few machines turn integers of 64 bits into floats
      const vd_narrow g = __builtin_convertvector(2.0 - (vd)(bits | 0x3ff0000000000000ull), vd_narrow);
      std::memcpy(gap + i, &g, sizeof g);
    }
    const vf slack = limit - load(gap);
    if (hmax(slack) < 0.0f) continue;
    for (int i = 0; i < LANES; i++)
      if (slack[i] >= 0.0f && v + i != p.best) consider(v + i);
  }
  for (; v < n; v++)
    if (v != p.best) consider(v);
  return winner.decided();
}

struct Candidate {
  float value;
  int32_t token;
};

// Sum over the row of exp((x - top) / temperature).
inline double total_mass(const float* x, int64_t n, float top, float temperature) {
  double total = 0;
  vf sum = {};
  int64_t v = 0;
  for (; v + LANES <= n; v += LANES) {
    sum += exp_neg((load(x + v) - top) / temperature);
    if (v % 4096 == 0) total += double(hsum(sum)), sum = vf{};
  }
  for (; v < n; v++) total += std::exp(double((x[v] - top) / temperature));
  return total + double(hsum(sum));
}

// Tokens that reach the `width`-th largest maximum of blocks, best first; all of them where there are fewer blocks.
inline void best_tokens(const float* x, int64_t n, const std::vector<float>& maxima, size_t width,
                        std::vector<Candidate>& out) {
  float floor = -std::numeric_limits<float>::infinity();
  if (width < maxima.size()) {
    static thread_local std::vector<float> order;
    order = maxima;
    std::nth_element(order.begin(), order.begin() + width - 1, order.end(), std::greater<float>());
    floor = order[width - 1];
  }
  out.clear();
  for (size_t b = 0; b < maxima.size(); b++) {
    if (maxima[b] < floor) continue;
    const int64_t end = std::min<int64_t>(n, int64_t(b + 1) * CANDIDATE_BLOCK);
    for (int64_t v = int64_t(b) * CANDIDATE_BLOCK; v < end; v++)
      if (x[v] >= floor && x[v] > -std::numeric_limits<float>::infinity()) out.push_back({x[v], int32_t(v)});
  }
  std::sort(out.begin(), out.end(), [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.token < b.token;
  });
}

// How many of the candidates, which go best first, survive the cuts of sampling/probs.py: at least `sure`, and at most
// `possible` where rounding could decide. Not `known` where tokens that are no candidates could survive as well.
struct Survivors {
  size_t sure, possible;
  bool known;
};

inline Survivors survivors(const std::vector<Candidate>& c, const DrawParams& p, double total, bool has_all) {
  const size_t count = c.size();
  const bool has_top_k = p.top_k > 0, has_top_p = p.top_p < 1.0;
  size_t kept = count;
  if (has_top_k && size_t(p.top_k) <= count) {
    const float kth = c[size_t(p.top_k) - 1].value;
    for (kept = size_t(p.top_k); kept < count && c[kept].value == kth;) kept++;
  }
  const bool settled = has_all || (has_top_k && size_t(p.top_k) <= count);
  const double top = double(c[0].value) / p.temperature, log_min_p = p.min_p > 0 ? std::log(p.min_p) : -INFINITY;
  auto relative = [&](size_t i) { return double(c[i].value) / p.temperature - top; };
  double norm = total;
  if (has_top_p && has_top_k) {
    norm = 0;
    for (size_t i = 0; i < kept; i++) norm += std::exp(relative(i));
  }
  const double close = has_top_k ? CLOSE_SCORES : CLOSE_MASSES;
  double before = 0, here = 0;
  size_t sure = kept;
  for (size_t i = 0; i < kept; i++) {
    const double r = relative(i);
    if (i && c[i].value != c[i - 1].value) {
      before += here, here = 0;
      const double past = has_top_p ? before / norm - p.top_p : -1.0, below = log_min_p - r;
      if (past > close || below > CLOSE_SCORES) return {std::min(sure, i), i, true};
      if (past >= -close || below >= -CLOSE_SCORES) sure = std::min(sure, i);
    }
    if (has_top_p) here += std::exp(r);
  }
  return {sure, kept, settled};
}

inline int64_t draw_limited(const float* x, int64_t n, const DrawParams& p) {
  static thread_local std::vector<float> maxima;
  static thread_local std::vector<Candidate> candidates;
  maxima.assign(size_t((n + CANDIDATE_BLOCK - 1) / CANDIDATE_BLOCK), -std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < n; v += CANDIDATE_BLOCK) {
    float& m = maxima[size_t(v / CANDIDATE_BLOCK)];
    if (v + CANDIDATE_BLOCK <= n)
      m = hmax(vmax(vmax(load(x + v), load(x + v + LANES)), vmax(load(x + v + 2 * LANES), load(x + v + 3 * LANES))));
    else
      for (int64_t i = v; i < n; i++) m = std::max(m, x[i]);
  }
  const bool needs_total = p.top_p < 1.0 && p.top_k <= 0;
  const double total = needs_total ? total_mass(x, n, x[p.best], float(p.temperature)) : 1.0;
  size_t width = std::max<size_t>(FIRST_BLOCKS, size_t(p.top_k));
  for (;; width *= 4) {
    const bool has_all = width >= maxima.size();
    best_tokens(x, n, maxima, width, candidates);
    const Survivors found = survivors(candidates, p, total, has_all);
    if (!found.known) continue;
    const Noise noise(p.key, p.position);
    Winner winner;
    for (size_t i = 0; i < found.possible; i++) {
      const double score = double(candidates[i].value) / p.temperature;
      if (score + double(MAX_GUMBEL) < winner.best) break;
      const double noisy = score + noise.gumbel(uint64_t(candidates[i].token));
      if (i < found.sure) winner.add(noisy, candidates[i].token);
      else if (noisy > winner.best - CLOSE_SCORES) return UNDECIDED;
    }
    return winner.decided();
  }
}

inline int64_t draw_row(const float* x, int64_t n, const DrawParams& p) {
  const bool is_limited = p.top_k > 0 || p.top_p < 1.0 || p.min_p > 0;
  return is_limited ? draw_limited(x, n, p) : draw_full(x, n, p);
}

}  // namespace ds
