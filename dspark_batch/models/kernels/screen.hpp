// Bounds of a product y = x W^T from small integers, at a half or a quarter of its bytes and, without bfloat16 units, of
// its cycles.
//
// With w = w' + dw and x = x' + dx, where w' and x' are integers times a scale, |x w - x' w'| <= |x'| |dw| + |dx| |w| (Cauchy,
// Schwarz). x' w' is exact in int32. What float adds, here and in the product itself, is far below K steps of 2^-23 of
// |x| |w|, and is added to |dx|.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm.hpp"
#include "vec.hpp"

namespace ds {

constexpr int MOST_WEIGHT = 127;
constexpr float NO_OUTPUT = -std::numeric_limits<float>::infinity();
constexpr double ROUNDED_UP = 1 + 1e-5;  // of norms, which are kept in float

// Weights [N, K] as int8, packed [N / LANES][K / 2][LANES][2] with N rounded up to an even number of tiles; the rest is by
// output, N rounded up to whole tiles.
struct Screen {
  int8_t* packed;
  float* scale;  // w' = scale * packed
  float* error;  // |w - w'|
  float* norm;   // |w|
};

// Largest integer of x': the sums of K products with weights stay within int32.
inline int most_of_rows(int64_t k) { return int(std::min<int64_t>(32767, (int64_t(1) << 31) / (k * MOST_WEIGHT) - 1)); }

// The outputs of one tile, from the packed product.
template <class T>
void pack_screen(const Linear<T>& w, int64_t tile, const Screen& to) {
  const int64_t cells = w.k / per_cell<T>;
  const float* packed = w.packed + tile * TILE_N * cells;
  auto weight = [&](int64_t output, int64_t at) {
    const T* cell = reinterpret_cast<const T*>(packed + packed_at(output, at / per_cell<T>, cells));
    return double(widen(cell[at % per_cell<T>]));
  };
  for (int64_t i = 0; i < TILE_N; i++) {
    const int64_t output = tile * TILE_N + i;
    double most = 0, squares = 0, errors = 0;
    for (int64_t c = 0; c < w.k; c++) most = std::max(most, std::fabs(weight(i, c))), squares += weight(i, c) * weight(i, c);
    const float scale = float(most / MOST_WEIGHT);
    int8_t* out = to.packed + output / LANES * LANES * w.k + output % LANES * 2;
    for (int64_t c = 0; c < w.k; c++) {
      const double q = scale > 0 ? std::nearbyint(weight(i, c) / scale) : 0, kept = std::clamp<double>(q, -127, 127);
      const double error = weight(i, c) - kept * scale;
      out[c / 2 * 2 * LANES + c % 2] = int8_t(kept);
      errors += error * error;
    }
    to.scale[output] = scale;
    to.error[output] = float(std::sqrt(errors) * ROUNDED_UP);
    to.norm[output] = float(std::sqrt(squares) * ROUNDED_UP);
  }
}

// One row as integers. Of a row that is not finite, or so small or so large that float could round bounds to nothing or to
// infinity, nothing is known.
struct IntegerRow {
  float scale, length, error;  // x' = scale * integers; |x'|; |dx|, with what float adds
  bool is_known;
};

template <class T>
IntegerRow to_integers(const T* x, int64_t k, int16_t* out) {
  float most = 0;
  bool is_finite = true;
  for (int64_t c = 0; c < k; c++) {
    const float size = std::fabs(widen(x[c]));
    is_finite &= size <= std::numeric_limits<float>::max();
    most = std::max(most, size);
  }
  if (!is_finite || most < 1e-10f || most > 1e20f) {
    std::fill(out, out + k, int16_t(0));
    return {0, 0, 0, false};
  }
  const double scale = float(most / float(most_of_rows(k))), inverse = 1 / scale;
  double squares = 0, lengths = 0, errors = 0;
  for (int64_t c = 0; c < k; c++) {
    const double value = widen(x[c]), integer = std::nearbyint(value * inverse), error = value - integer * scale;
    out[c] = int16_t(integer);
    squares += value * value, lengths += integer * integer, errors += error * error;
  }
  const double added = double(k) / (1 << 23) * std::sqrt(squares);
  return {float(scale), float(std::sqrt(lengths) * scale * ROUNDED_UP), float((std::sqrt(errors) + added) * ROUNDED_UP), true};
}

// Sums of a block of M rows with COLUMNS vectors of outputs. The vectors after these are fetched on the way.
template <int M, int COLUMNS, bool FETCH>
DS_INLINE void dot_pairs(const int8_t* w, const int16_t* x, int64_t k, vi (&acc)[M][COLUMNS]) {
  for (int64_t c = 0; c < k; c += 2) {
    vi wide[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) {
      wide[j] = load_pairs(w + j * LANES * k + c * LANES);
      if (FETCH) __builtin_prefetch(w + (COLUMNS + j) * LANES * k + c * LANES, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      int32_t pair;
      std::memcpy(&pair, x + i * k + c, 4);
      const vi a = vi{} + pair;
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; j++) acc[i][j] = dot_pair(acc[i][j], wide[j], a);
    }
  }
}

// Bounds of the outputs of some rows.
struct Bounds {
  const Screen& screen;
  const int16_t* integers;  // [M, K]
  const IntegerRow* rows;   // [M]
  int64_t m, n, k;
  float* upper;  // [N / LANES, M]: what no output of that vector exceeds

  static constexpr int COLUMNS = SUMS / BLOCK_M;

  // Vectors [first, last) of outputs: `upper`, and in lower [M] what the largest output of a row is at least.
  void find(int64_t first, int64_t last, float* lower) const {
    vf* best = reinterpret_cast<vf*>(scratch<5>(size_t(m) * LANES));
    std::fill(best, best + m, splat(NO_OUTPUT));
    for (int64_t vector = first; vector < last; vector += COLUMNS)
      for (int64_t row = 0; row < m;) {
        const int64_t left = m - row;
        if (left >= 6) row += block<6>(vector, last, row, best);
        else if (left >= 4) row += block<4>(vector, last, row, best);
        else if (left >= 2) row += block<2>(vector, last, row, best);
        else row += block<1>(vector, last, row, best);
      }
    for (int64_t row = 0; row < m; row++) lower[row] = hmax(best[row]);
  }

 private:
  template <int M>
  int64_t block(int64_t vector, int64_t last, int64_t row, vf* best) const {
    vi acc[M][COLUMNS] = {};
    const int8_t* w = screen.packed + vector * LANES * k;
    if (row == 0) dot_pairs<M, COLUMNS, true>(w, integers + row * k, k, acc);
    else dot_pairs<M, COLUMNS, false>(w, integers + row * k, k, acc);
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) {
      if (vector + j >= last) break;
      const int64_t at = (vector + j) * LANES;
      const vf scale = load(screen.scale + at), error = load(screen.error + at), norm = load(screen.norm + at);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        const IntegerRow& r = rows[row + i];
        const vf middle = to_float(acc[i][j]) * (scale * r.scale), radius = fma(error, splat(r.length), norm * r.error);
        vf above = middle + radius, below = middle - radius;
        if (at + LANES > n) cut(std::max<int64_t>(0, n - at), above, below);
        upper[(vector + j) * m + row + i] = hmax(above);
        best[row + i] = vmax(best[row + i], below);
      }
    }
    return M;
  }

  // Lanes from `count` on are no outputs.
  static void cut(int64_t count, vf& above, vf& below) {
    alignas(64) float a[LANES], b[LANES];
    store(a, above), store(b, below);
    for (int64_t i = count; i < LANES; i++) a[i] = b[i] = NO_OUTPUT;
    above = load(a), below = load(b);
  }
};

}  // namespace ds
