// Products of activations [M, K] with weights packed once: y = x W^T.
//
// Packed layout: [N/32][K cells][32] cells, so one tile of 32 outputs is one contiguous stream. Every output is the sum
// over K cells in order, whatever M, the tiling of M and the threads: a row's result does not depend on its batch.
#pragma once
#include "parallel.hpp"
#include "rows.hpp"
#include "vec.hpp"

namespace ds {

constexpr int TILE_N = 32;
constexpr int BLOCK_M = 6;
constexpr int PART_M = 96;
constexpr int RUN_CELLS = 32;

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
    uint32_t* to = reinterpret_cast<uint32_t*>(out) + half * LANES;
    const uint32_t* row[LANES];
    for (int i = 0; i < LANES; i++) {
      int64_t at = tile * TILE_N + half * LANES + i;
      row[i] = at < n ? reinterpret_cast<const uint32_t*>(weight + order[at] * k) : nullptr;
    }
    int64_t c = 0;
    for (; c + LANES <= cells; c += LANES) {
      const uint32_t* from[LANES];
      for (int i = 0; i < LANES; i++) from[i] = row[i] ? row[i] + c : zeros;
      transpose16(from, to + c * TILE_N, TILE_N);
    }
    for (; c < cells; c++)
      for (int i = 0; i < LANES; i++) {
        to[c * TILE_N + i] = 0;
        if (row[i]) std::memcpy(to + c * TILE_N + i, row[i] + c, 4);
      }
  }
}

// Products of M rows with TILES tiles of weights, COLUMNS vectors of them at a time, kept in registers: 6 x 64 outputs
// come within 3 % of the peak of a core with 32 registers of 16 floats (12 x 32 need more row pointers than there are
// registers for); 16 registers of 8 floats hold 6 x 16.
template <class T, int M, int TILES>
struct Micro {
  const T* x;  // M rows
  int64_t ldx;
  const float* w;       // TILES streams of `cells` cells
  int64_t cells;
  const char* ahead;  // what comes next, FETCH cache lines of it a cell, or null

  static constexpr int COLUMNS = SUMS >= 2 * TILES * M ? 2 * TILES : SUMS >= 2 * M ? 2 : 1;
  typedef vf Part[M][COLUMNS];
  typedef vf Sums[M][2 * TILES];

  template <int FETCH>
  inline void add(int64_t c0, int64_t c1, int first, const char* lines, Part& acc) const {
    for (int64_t c = c0; c < c1; c++) {
      vf wide[COLUMNS];
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++)
        wide[j] = load(w + ((first + j) / 2 * cells + c) * TILE_N + (first + j) % 2 * LANES);
      for (int j = 0; j < FETCH; j++) __builtin_prefetch(lines + (c * FETCH + j) * 64, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        vf a = broadcast_cell(x + i * ldx + c * per_cell<T>);
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) acc[i][j] = dot_cell<T>(acc[i][j], wide[j], a);
      }
    }
  }

  // float32 is summed in runs of RUN_CELLS, the runs one after another: the rounding error of a long sum falls several
  // times. In bfloat16 the inputs' own rounding is far larger.
  template <int FETCH>
  inline void run_columns(int first, const char* lines, Sums& acc) const {
    const int64_t run = sizeof(T) == 2 ? cells : RUN_CELLS;
    for (int64_t c = 0; c < cells; c += run) {
      Part part = {};
      add<FETCH>(c, c + run < cells ? c + run : cells, first, lines, part);
      for (int i = 0; i < M; i++)
        for (int j = 0; j < COLUMNS; j++) acc[i][first + j] += part[i][j];
    }
  }

  // The lines to fetch are spread over the passes.
  template <int FETCH>
  inline void run(Sums& acc) const {
    constexpr int PASSES = 2 * TILES / COLUMNS, EACH = FETCH > PASSES ? FETCH / PASSES : FETCH ? 1 : 0;
    for (auto& row : acc)
      for (vf& a : row) a = vf{};
#pragma GCC unroll 4
    for (int pass = 0; pass < PASSES; pass++) {
      if (pass * EACH < FETCH) run_columns<EACH>(pass * COLUMNS, ahead + pass * EACH * cells * 64, acc);
      else run_columns<0>(pass * COLUMNS, nullptr, acc);
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

// M rows from `row` on, times tiles [tile, tile + TILES).
template <class T, int M, int TILES>
inline void multiply(const Linear<T>& w, const T* x, int64_t row, int64_t tile, const char* ahead, int fetch,
                     const Target<T>& to) {
  const int64_t cells = w.k / per_cell<T>;
  const Micro<T, M, TILES> micro{x + row * w.k, w.k, w.packed + tile * TILE_N * cells, cells, ahead};
  typename Micro<T, M, TILES>::Sums acc;
  if (fetch == 0) micro.template run<0>(acc);
  else if (fetch == 1) micro.template run<1>(acc);
  else if (fetch == 2) micro.template run<2>(acc);
  else micro.template run<2 * TILES>(acc);
  for (int j = 0; j < TILES; j++) {
    const int64_t col = (tile + j) * TILE_N;
    for (int i = 0; i < M; i++) {
      vf a = acc[i][2 * j], b = acc[i][2 * j + 1];
      if (w.bias) a += load(w.bias + col), b += load(w.bias + col + LANES);
      keep<T>(to.y, to.ldy, row + i, col, w.n, to.how, a, b);
    }
  }
}

// Rows [m0, m1) times TILES tiles, in blocks of nearly equal height. The stream of the tiles after these is fetched on
// the way, evenly over the blocks: all of it at once would hold up the loads of this one.
template <class T, int TILES>
void multiply_rows(const Linear<T>& w, const T* x, int64_t m0, int64_t m1, int64_t tile, const Target<T>& to) {
  const int64_t cells = w.k / per_cell<T>, num_lines = cells * 2 * TILES;
  const int64_t blocks = (m1 - m0 + BLOCK_M - 1) / BLOCK_M;
  const bool is_last = tile + 2 * TILES > (w.n + TILE_N - 1) / TILE_N;
  const char* next = reinterpret_cast<const char*>(w.packed + (tile + TILES) * TILE_N * cells);
  const int fetch = blocks >= 2 * TILES ? 1 : blocks >= TILES ? 2 : 2 * TILES;
  int64_t fetched = is_last ? num_lines : 0;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t row = m0 + b * (m1 - m0) / blocks, height = m0 + (b + 1) * (m1 - m0) / blocks - row;
    const char* ahead = next + fetched * 64;
    const int some = fetched < num_lines ? fetch : 0;
    fetched += some * cells;
    switch (height) {
      case 6: multiply<T, 6, TILES>(w, x, row, tile, ahead, some, to); break;
      case 5: multiply<T, 5, TILES>(w, x, row, tile, ahead, some, to); break;
      case 4: multiply<T, 4, TILES>(w, x, row, tile, ahead, some, to); break;
      case 3: multiply<T, 3, TILES>(w, x, row, tile, ahead, some, to); break;
      case 2: multiply<T, 2, TILES>(w, x, row, tile, ahead, some, to); break;
      default: multiply<T, 1, TILES>(w, x, row, tile, ahead, some, to); break;
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
