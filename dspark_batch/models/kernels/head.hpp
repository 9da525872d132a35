// The product with the vocabulary and its arg-max in one pass: the logits never leave the cache.
#pragma once
#include <vector>

#include "gemm.hpp"
#include "rows.hpp"

namespace ds {

constexpr int PAIRS_PER_RANGE = 8;

// Of every row of x [M, K]: index of the first largest output, its distance to the next, and its value. The outputs are
// those that a product stored in float has.
template <class T>
void product_argmax(const Linear<T>& w, const T* x, int64_t m, int64_t* index, float* margin, float* best) {
  const int64_t pairs = (w.n + 2 * TILE_N - 1) / (2 * TILE_N), tiles = (w.n + TILE_N - 1) / TILE_N;
  const int64_t ranges = (pairs + PAIRS_PER_RANGE - 1) / PAIRS_PER_RANGE;
  std::vector<Top> tops(size_t(ranges * m));
  run_team(true, 2, [&](Team& team) {
    team.share_ranges(int(ranges), [&](int range) {
      float* logits = scratch<3>(PART_M * 2 * TILE_N);
      const int64_t end = std::min<int64_t>(pairs, int64_t(range + 1) * PAIRS_PER_RANGE);
      for (int64_t pair = int64_t(range) * PAIRS_PER_RANGE; pair < end; pair++) {
        const int64_t col = pair * 2 * TILE_N, count = std::min<int64_t>(2 * TILE_N, w.n - col);
        for (int64_t m0 = 0; m0 < m; m0 += PART_M) {
          const int64_t rows = std::min<int64_t>(PART_M, m - m0);
          // `logits` holds these columns of these rows only.
          Target<T> to{logits - col, 2 * TILE_N, Epilogue::STORE_F32};
          multiply_tiles(w, x + m0 * w.k, 0, rows, 2 * pair, 2 * pair + 1 < tiles ? 2 : 1, to);
          for (int64_t r = 0; r < rows; r++)
            scan(tops[size_t(range * m + m0 + r)], logits + r * 2 * TILE_N, count, col);
        }
      }
    });
    team.share_ranges(int(m), [&](int row) {
      Top top;
      for (int64_t range = 0; range < ranges; range++) top.add(tops[size_t(range * m + row)]);
      top.write(index + row, margin + row);
      best[row] = top.has_nan ? std::nanf("") : top.best;
    });
  });
}

}  // namespace ds
