// Products of activations [M, K] with weights packed once: y = x W^T.
//
// Packed layout: [N/STRIP][K cells][STRIP] cells, so what a pass of the micro-kernel reads is one contiguous stream.
// Every output is the sum over K cells in order, in runs of RUN_CELLS, whatever M, the tiling of M and the threads: a
// row's result does not depend on its batch.
#pragma once
#include "parallel.hpp"
#include "rows.hpp"
#include "vec.hpp"

namespace ds {

constexpr int TILE_N = 32;
constexpr int BLOCK_M = 6;
constexpr int PART_M = 96;
constexpr int STRIP = HAS_FEW_SUMS ? LANES : 2 * LANES;  // outputs side by side

// Where a cell of an output lies, counted from the first output of a tile.
inline int64_t packed_at(int64_t output, int64_t cell, int64_t cells) {
  return (output / STRIP * cells + cell) * STRIP + output % STRIP;
}

// float32 is summed in runs, the runs one after another: the rounding error of a long sum falls several times. In
// bfloat16 the inputs' own rounding is far larger.
constexpr int RUN_CELLS = 96;
template <class T>
inline int64_t run_of(int64_t cells) {
  return sizeof(T) == 2 || cells < RUN_CELLS ? cells : RUN_CELLS;
}

enum class Epilogue : int32_t { STORE = 0, ADD = 1, GATE = 2, STORE_F32 = 3 };

template <class T>
struct Linear {
  const float* packed;
  const T* bias;  // [N] in packed order, or null
  int64_t n, k;
};

// rows: [N, K] in T; order: packed output i is row order[i].
template <class T>
inline void pack_tile(const T* weight, const int64_t* order, int64_t tile, int64_t n, int64_t k, float* out) {
  int64_t cells = k / per_cell<T>;
  alignas(64) static const uint32_t zeros[LANES] = {};
  out += tile * TILE_N * cells;
  for (int half = 0; half < 2; half++) {
    uint32_t* to = reinterpret_cast<uint32_t*>(out) + packed_at(half * LANES, 0, cells);
    const uint32_t* row[LANES];
    for (int i = 0; i < LANES; i++) {
      int64_t at = tile * TILE_N + half * LANES + i;
      row[i] = at < n ? reinterpret_cast<const uint32_t*>(weight + order[at] * k) : nullptr;
    }
    int64_t c = 0;
    for (; c + LANES <= cells; c += LANES) {
      const uint32_t* from[LANES];
      for (int i = 0; i < LANES; i++) from[i] = row[i] ? row[i] + c : zeros;
      transpose16(from, to + c * STRIP, STRIP);
    }
    for (; c < cells; c++)
      for (int i = 0; i < LANES; i++) {
        to[c * STRIP + i] = 0;
        if (row[i]) std::memcpy(to + c * STRIP + i, row[i] + c, 4);
      }
  }
}

// Cells [from, to) of a contraction.
struct Run {
  int64_t from, to;
};

// Lines to ask for on the way, per_cell of them for every cell of a run.
struct Fetch {
  const char* lines;
  int per_cell;
};

// Products of M rows with TILES tiles of weights over a run, COLUMNS vectors of them at a time, kept in registers:
// 6 x 64 outputs come within 3 % of the peak of a core with 32 registers of 16 floats (12 x 32 need more row pointers
// than there are registers for); 16 registers of 8 floats hold 6 x 16.
template <class T, int M, int TILES>
struct Micro {
  const T* x;  // M rows
  int64_t ldx;
  const float* w;
  int64_t cells;

  static constexpr int COLUMNS = SUMS >= 2 * TILES * M ? 2 * TILES : SUMS >= 2 * M ? 2 : 1;
  typedef vf Part[M][COLUMNS];
  typedef vf Sums[M][2 * TILES];

  template <int FETCH>
  DS_INLINE void add(Run run, int first, const char* lines, Part& acc) const {
    for (int64_t c = run.from; c < run.to; c++) {
      vf wide[COLUMNS];
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++) wide[j] = load(w + packed_at((first + j) * LANES, c, cells));
      for (int j = 0; j < FETCH; j++) __builtin_prefetch(lines + ((c - run.from) * FETCH + j) * 64, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        vf a = broadcast_cell(x + i * ldx + c * per_cell<T>);
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) acc[i][j] = dot_cell<T>(acc[i][j], wide[j], a);
      }
    }
  }

  // Adds what the runs before have left in `sums`, and leaves the result there, or after the last run in acc. FETCH
  // lines a cell are spread over the passes.
  template <int FETCH>
  DS_INLINE void sum(Run run, const char* lines, float* sums, Sums& acc) const {
    constexpr int PASSES = 2 * TILES / COLUMNS, EACH = FETCH > PASSES ? FETCH / PASSES : FETCH ? 1 : 0;
#pragma GCC unroll 4
    for (int pass = 0; pass < PASSES; pass++) {
      Part part = {};
      if (pass * EACH < FETCH) add<EACH>(run, pass * COLUMNS, lines + pass * EACH * (run.to - run.from) * 64, part);
      else add<0>(run, pass * COLUMNS, nullptr, part);
      float* s = sums + pass * COLUMNS * LANES;
#pragma GCC unroll 8
      for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
          float* at = s + (i * 2 * TILES + j) * LANES;
          if (run.from > 0) part[i][j] += load(at);
          if (run.to < cells) store(at, part[i][j]);
          else acc[i][pass * COLUMNS + j] = part[i][j];
        }
    }
  }
};

template <class T>
inline void keep(void* y, int64_t ldy, int64_t row, int64_t col, int64_t n, Epilogue how, vf a, vf b) {
  alignas(64) T t[TILE_N];
  if (how == Epilogue::GATE) return store(static_cast<T*>(y) + row * ldy + col / 2, gated<T>(a, b));
  bool whole = col + TILE_N <= n;
  if (how == Epilogue::STORE_F32) {
    float* to = static_cast<float*>(y) + row * ldy + col;
    if (whole) return store(to, a), store(to + LANES, b);
    for (int i = 0; i < TILE_N && col + i < n; i++) to[i] = i < LANES ? a[i] : b[i - LANES];
    return;
  }
  T* to = static_cast<T*>(y) + row * ldy + col;
  if (!whole) {
    store(t, a), store(t + LANES, b);
    for (int i = 0; col + i < n; i++) to[i] = how == Epilogue::ADD ? narrow<T>(widen(to[i]) + widen(t[i])) : t[i];
    return;
  }
  if (how == Epilogue::ADD) {
    a = load(to) + rounded<T>(a);
    b = load(to + LANES) + rounded<T>(b);
  }
  store(to, a), store(to + LANES, b);
}

// How a product is written.
template <class T>
struct Target {
  void* y;
  int64_t ldy;
  Epilogue how;
};

// M rows from `row` on, times tiles [tile, tile + TILES), over one run; the last one writes the product. sums: theirs, for
// the runs to come.
template <class T, int M, int TILES>
inline void multiply(const Linear<T>& w, const T* x, int64_t row, int64_t tile, Run run, float* sums, Fetch fetch,
                     const Target<T>& to) {
  const int64_t cells = w.k / per_cell<T>;
  const Micro<T, M, TILES> micro{x + row * w.k, w.k, w.packed + tile * TILE_N * cells, cells};
  typename Micro<T, M, TILES>::Sums acc;
  if (fetch.per_cell == 0) micro.template sum<0>(run, nullptr, sums, acc);
  else if (fetch.per_cell == 1) micro.template sum<1>(run, fetch.lines, sums, acc);
  else if (fetch.per_cell == 2) micro.template sum<2>(run, fetch.lines, sums, acc);
  else micro.template sum<2 * TILES>(run, fetch.lines, sums, acc);
  if (run.to < cells) return;
  for (int j = 0; j < TILES; j++) {
    const int64_t col = (tile + j) * TILE_N;
    for (int i = 0; i < M; i++) {
      vf a = acc[i][2 * j], b = acc[i][2 * j + 1];
      if (w.bias) a += load(w.bias + col), b += load(w.bias + col + LANES);
      keep<T>(to.y, to.ldy, row + i, col, w.n, to.how, a, b);
    }
  }
}

// First row of a block, of nearly equal ones. Four rows have too few sums to hide what a product takes where a register
// holds few of them: three and one more in the next block.
inline int64_t block_start(int64_t block, int64_t blocks, int64_t rows) {
  const int64_t row = block * rows / blocks;
  return HAS_FEW_SUMS && block == 1 && blocks > 1 && row == 4 ? 3 : row;
}

// Rows [m0, m1) times TILES tiles: run after run, so that the weights of a run stay in the nearest cache for all rows.
// The stream of the tiles after these is fetched on the way, evenly over runs and blocks: all of it at once would hold up
// the loads of this one.
template <class T, int TILES>
void multiply_rows(const Linear<T>& w, const T* x, int64_t m0, int64_t m1, int64_t tile, const Target<T>& to) {
  const int64_t cells = w.k / per_cell<T>, run_cells = run_of<T>(cells), rows = m1 - m0;
  const int64_t blocks = (rows + BLOCK_M - 1) / BLOCK_M;
  const bool is_last = tile + 2 * TILES > (w.n + TILE_N - 1) / TILE_N;
  const char* next = reinterpret_cast<const char*>(w.packed + (tile + TILES) * TILE_N * cells);
  const int per_cell = is_last ? 0 : blocks >= 2 * TILES ? 1 : blocks >= TILES ? 2 : 2 * TILES;
  float* sums = scratch<4>(size_t(rows) * TILES * TILE_N);
  for (int64_t from = 0; from < cells; from += run_cells) {
    const Run run{from, from + run_cells < cells ? from + run_cells : cells};
    int64_t fetched = run.from * 2 * TILES;  // lines
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t start = block_start(b, blocks, rows), height = block_start(b + 1, blocks, rows) - start;
      const Fetch fetch{next + fetched * 64, fetched < run.to * 2 * TILES ? per_cell : 0};
      fetched += fetch.per_cell * (run.to - run.from);
      float* s = sums + start * TILES * TILE_N;
      switch (height) {
        case 6: multiply<T, 6, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
        case 5: multiply<T, 5, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
        case 4: multiply<T, 4, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
        case 3: multiply<T, 3, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
        case 2: multiply<T, 2, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
        default: multiply<T, 1, TILES>(w, x, m0 + start, tile, run, s, fetch, to); break;
      }
    }
  }
}

// One tile or two.
template <class T>
inline void multiply_tiles(const Linear<T>& w, const T* x, int64_t m0, int64_t m1, int64_t tile, int64_t num_tiles,
                           const Target<T>& to) {
  if (num_tiles == 2) return multiply_rows<T, 2>(w, x, m0, m1, tile, to);
  multiply_rows<T, 1>(w, x, m0, m1, tile, to);
}

// y[:, n] of all m rows as one phase of a team. Every thread has a range of tiles, which it takes in pairs and, where
// there are many rows, in parts that a thread that is done early can take over.
template <class T>
inline void product(Team& team, const Linear<T>& w, const T* x, int64_t m, const Target<T>& to) {
  const int64_t tiles = (w.n + TILE_N - 1) / TILE_N, threads = team.size();
  const int64_t pairs = ((tiles + threads - 1) / threads + 1) / 2;
  const int64_t parts = m > 2 * PART_M ? m / PART_M : 1;
  team.share_ranges(int(threads * pairs * parts), [&](int i) {
    const int64_t part = i % parts, pair = i / parts % pairs, owner = i / parts / pairs;
    const int64_t tile = owner * tiles / threads + 2 * pair, end = (owner + 1) * tiles / threads;
    if (tile >= end) return;
    multiply_tiles(w, x, part * m / parts, (part + 1) * m / parts, tile, tile + 1 < end ? 2 : 1, to);
  });
}

}  // namespace ds
