// The product with the vocabulary and its arg-max in one pass: the logits never leave the cache, and most are never made.
#pragma once
#include <vector>

#include "gemm.hpp"
#include "rows.hpp"
#include "screen.hpp"

namespace ds {

constexpr int RANGE_TILES = 16;
constexpr int SCREENED_ROWS = 256;  // their integers and bounds stay in a cache

// Of every row: index of the first largest output (-1 where one is NaN), and its value.
struct Best {
  int64_t* index;
  float* value;
};

// The largest outputs of M rows in every range of tiles.
struct RangeTops {
  int64_t m, tiles;
  std::vector<Top> tops = std::vector<Top>(size_t(num_ranges() * m));

  int64_t num_ranges() const { return (tiles + RANGE_TILES - 1) / RANGE_TILES; }
  int64_t first(int64_t range) const { return range * RANGE_TILES; }
  int64_t last(int64_t range) const { return std::min<int64_t>(tiles, first(range + 1)); }
  Top& at(int64_t range, int64_t row) { return tops[size_t(range * m + row)]; }

  void write(int64_t row, const Best& to) {
    Top top;
    for (int64_t range = 0; range < num_ranges(); range++) top.add(at(range, row));
    to.index[row] = top.has_nan ? -1 : top.at;
    to.value[row] = top.has_nan ? std::nanf("") : top.best;
  }
};

// Of every row of x [M, K]. The outputs are those that a product stored in float has.
template <class T>
void product_argmax(const Linear<T>& w, const T* x, int64_t m, const Best& best) {
  RangeTops tops{m, (w.n + TILE_N - 1) / TILE_N};
  run_team(true, 2, [&](Team& team) {
    team.share_ranges(int(tops.num_ranges()), [&](int range) {
      float* logits = scratch<3>(PART_M * 2 * TILE_N);
      for (int64_t tile = tops.first(range); tile < tops.last(range); tile += 2) {
        const int64_t col = tile * TILE_N, count = std::min<int64_t>(2 * TILE_N, w.n - col);
        for (int64_t m0 = 0; m0 < m; m0 += PART_M) {
          const int64_t rows = std::min<int64_t>(PART_M, m - m0);
          // `logits` holds these columns of these rows only.
          Target<T> to{logits - col, 2 * TILE_N, Epilogue::STORE_F32};
          multiply_tiles(w, x + m0 * w.k, 0, rows, tile, tile + 1 < tops.tiles ? 2 : 1, to);
          for (int64_t r = 0; r < rows; r++) scan(tops.at(range, m0 + r), logits + r * 2 * TILE_N, count, col);
        }
      }
    });
    team.share_ranges(int(m), [&](int row) { tops.write(row, best); });
  });
}

// The same, of at most SCREENED_ROWS rows: only tiles with an output that may be the largest of a row are made for it.
template <class T>
void screened_argmax_part(const Linear<T>& w, const Screen& screen, const T* x, int64_t m, const Best& best) {
  RangeTops tops{m, (w.n + TILE_N - 1) / TILE_N};
  constexpr int VECTORS = TILE_N / LANES;
  const int64_t ranges = tops.num_ranges();
  int16_t* integers = reinterpret_cast<int16_t*>(scratch<6>(size_t(m * w.k / 2)));
  float* upper = scratch<7>(size_t(tops.tiles * VECTORS * m));
  float* lower = scratch<9>(size_t((ranges + 1) * m));
  float* least = lower + ranges * m;
  IntegerRow rows[SCREENED_ROWS];
  const Bounds bounds{screen, integers, rows, m, w.n, w.k, upper};
  run_team(true, 5, [&](Team& team) {
    team.share_ranges(int(m), [&](int row) { rows[row] = to_integers(x + row * w.k, w.k, integers + row * w.k); });
    team.share_ranges(int(ranges), [&](int range) {
      bounds.find(tops.first(range) * VECTORS, tops.last(range) * VECTORS, lower + range * m);
    });
    team.share_ranges(int(m), [&](int row) {
      float most = NO_OUTPUT;
      for (int64_t range = 0; range < ranges; range++) most = std::max(most, lower[range * m + row]);
      least[row] = rows[row].is_known ? most : NO_OUTPUT;
    });
    team.share_ranges(int(ranges), [&](int range) {
      float* logits = scratch<3>(SCREENED_ROWS * TILE_N);
      T* taken = reinterpret_cast<T*>(scratch<8>(size_t(SCREENED_ROWS * w.k)));
      int64_t owner[SCREENED_ROWS];
      for (int64_t tile = tops.first(range); tile < tops.last(range); tile++) {
        int64_t count = 0;
        for (int64_t row = 0; row < m; row++) {
          const float* above = upper + tile * VECTORS * m + row;
          if (above[0] < least[row] && above[m] < least[row]) continue;  // a bound that is no number keeps the tile
          std::memcpy(taken + count * w.k, x + row * w.k, sizeof(T) * size_t(w.k));
          owner[count++] = row;
        }
        if (count == 0) continue;
        const int64_t col = tile * TILE_N, width = std::min<int64_t>(TILE_N, w.n - col);
        const Linear<T> alone{w.packed, w.bias, col + width, w.k};  // the tile after it need not be fetched
        multiply_tiles(alone, taken, 0, count, tile, 1, Target<T>{logits - col, TILE_N, Epilogue::STORE_F32});
        for (int64_t i = 0; i < count; i++) scan(tops.at(range, owner[i]), logits + i * TILE_N, width, col);
      }
    });
    team.share_ranges(int(m), [&](int row) { tops.write(row, best); });
  });
}

template <class T>
void screened_argmax(const Linear<T>& w, const Screen& screen, const T* x, int64_t m, const Best& best) {
  for (int64_t row = 0; row < m; row += SCREENED_ROWS)
    screened_argmax_part(w, screen, x + row * w.k, std::min<int64_t>(SCREENED_ROWS, m - row),
                         {best.index + row, best.value + row});
}

}  // namespace ds
