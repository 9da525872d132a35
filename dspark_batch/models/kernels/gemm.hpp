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
constexpr int TILE_M = 12;
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

// Cells c0 .. c1-1 onto acc.
template <class T, int M>
inline void micro_cells(const T* x, int64_t ldx, const float* w, int64_t c0, int64_t c1, const char* ahead,
                        vf (&acc)[M][2]) {
  for (int64_t c = c0; c < c1; c++) {
    vf w0 = load(w + c * TILE_N), w1 = load(w + c * TILE_N + LANES);
    if (ahead) {
      __builtin_prefetch(ahead + c * TILE_N * 4, 0, 2);
      __builtin_prefetch(ahead + c * TILE_N * 4 + 64, 0, 2);
    }
    for (int i = 0; i < M; i++) {
      vf a = broadcast_cell(x + i * ldx + c * per_cell<T>);
      acc[i][0] = dot_cell<T>(acc[i][0], w0, a);
      acc[i][1] = dot_cell<T>(acc[i][1], w1, a);
    }
  }
}

// float32 is summed in runs of RUN_CELLS, the runs one after another: the rounding error of a long sum falls several
// times. In bfloat16 the inputs' own rounding is far larger.
template <class T, int M>
inline void micro(const T* x, int64_t ldx, const float* w, int64_t cells, const char* ahead, vf (&acc)[M][2]) {
  for (int i = 0; i < M; i++) acc[i][0] = acc[i][1] = vf{};
  if constexpr (sizeof(T) == 2) {
    micro_cells<T, M>(x, ldx, w, 0, cells, ahead, acc);
  } else {
    for (int64_t c = 0; c < cells; c += RUN_CELLS) {
      vf run[M][2] = {};
      micro_cells<T, M>(x, ldx, w, c, c + RUN_CELLS < cells ? c + RUN_CELLS : cells, ahead, run);
      for (int i = 0; i < M; i++) acc[i][0] += run[i][0], acc[i][1] += run[i][1];
    }
  }
}

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

template <class T, int M>
inline void rows_of_tile(const Linear<T>& w, const T* x, int64_t ldx, int64_t row, int64_t tile, const char* ahead, void* y,
                  int64_t ldy, Epilogue how) {
  vf acc[M][2];
  int64_t cells = w.k / per_cell<T>;
  micro<T, M>(x + row * ldx, ldx, w.packed + tile * TILE_N * cells, cells, ahead, acc);
  int64_t col = tile * TILE_N;
  for (int i = 0; i < M; i++) {
    vf a = acc[i][0], b = acc[i][1];
    if (w.bias) a += load(w.bias + col), b += load(w.bias + col + LANES);
    keep<T>(y, ldy, row + i, col, w.n, how, a, b);
  }
}

// Rows [m0, m1) of one tile of 32 outputs.
template <class T>
void tile_product(const Linear<T>& w, const T* x, int64_t ldx, int64_t m0, int64_t m1, int64_t tile, void* y, int64_t ldy,
                  Epilogue how) {
  int64_t cells = w.k / per_cell<T>;
  const char* ahead = reinterpret_cast<const char*>(w.packed + (tile + 1) * TILE_N * cells);
  if (tile + 1 >= (w.n + TILE_N - 1) / TILE_N) ahead = nullptr;
  int64_t m = m0;
  // The stream of the next tile is fetched while the rows of this one are multiplied.
#define DS_ROWS(M)                                                       \
  rows_of_tile<T, M>(w, x, ldx, m, tile, ahead, y, ldy, how); \
  ahead = nullptr;                                                       \
  m += M;
  while (m1 - m >= TILE_M) {
    DS_ROWS(TILE_M)
  }
  switch (m1 - m) {
    case 11: { DS_ROWS(11) break; }
    case 10: { DS_ROWS(10) break; }
    case 9: { DS_ROWS(9) break; }
    case 8: { DS_ROWS(8) break; }
    case 7: { DS_ROWS(7) break; }
    case 6: { DS_ROWS(6) break; }
    case 5: { DS_ROWS(5) break; }
    case 4: { DS_ROWS(4) break; }
    case 3: { DS_ROWS(3) break; }
    case 2: { DS_ROWS(2) break; }
    case 1: { DS_ROWS(1) break; }
    default: break;
  }
#undef DS_ROWS
}

}  // namespace ds
