// Keys and values of a row where they lie in the cache, and keys side by side, as dot products want them.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.hpp"

namespace ds {

constexpr int PACK_KEYS = 32;  // keys side by side in a packed key block: two vectors
constexpr int MAX_HEAD_DIM = 256;

struct Row {
  int32_t token_start, num_tokens, kv_len, own_start, prefix_start, prefix_len;
};

// Columns c .. c + 3 of 16 rows: out[j] holds cell c + j of every row.
inline void columns4(const uint32_t* const rows[16], int c, vf out[4]) {
#ifdef DSPARK_AVX512
  __m512i quad[4];  // quad[i]: the four cells of rows i, 4 + i, 8 + i and 12 + i; put together by loads, not by shuffles
  for (int i = 0; i < 4; i++) {
    auto cells = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + c)); };
    __m512i x = _mm512_castsi128_si512(cells(i));
    x = _mm512_mask_broadcast_i32x4(x, 0x00f0, cells(4 + i));
    x = _mm512_mask_broadcast_i32x4(x, 0x0f00, cells(8 + i));
    quad[i] = _mm512_mask_broadcast_i32x4(x, 0xf000, cells(12 + i));
  }
  __m512i a = _mm512_unpacklo_epi32(quad[0], quad[1]), b = _mm512_unpackhi_epi32(quad[0], quad[1]);
  __m512i d = _mm512_unpacklo_epi32(quad[2], quad[3]), e = _mm512_unpackhi_epi32(quad[2], quad[3]);
  out[0] = (vf)_mm512_unpacklo_epi64(a, d), out[1] = (vf)_mm512_unpackhi_epi64(a, d);
  out[2] = (vf)_mm512_unpacklo_epi64(b, e), out[3] = (vf)_mm512_unpackhi_epi64(b, e);
#elif defined(DSPARK_AVX2)
  for (int half = 0; half < 2; half++) {  // as above, eight rows at a time
    __m256 quad[4];
    for (int i = 0; i < 4; i++) {
      auto cells = [&](int row) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows[8 * half + row] + c)); };
      quad[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(cells(i)), cells(4 + i), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(quad[0], quad[1]), b = _mm256_unpackhi_ps(quad[0], quad[1]);
    const __m256 d = _mm256_unpacklo_ps(quad[2], quad[3]), e = _mm256_unpackhi_ps(quad[2], quad[3]);
    out[0].part[half] = _mm256_shuffle_ps(a, d, 0x44), out[1].part[half] = _mm256_shuffle_ps(a, d, 0xee);
    out[2].part[half] = _mm256_shuffle_ps(b, e, 0x44), out[3].part[half] = _mm256_shuffle_ps(b, e, 0xee);
  }
#else
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 16; i++) std::memcpy(reinterpret_cast<char*>(&out[j]) + 4 * i, rows[i] + c + j, 4);
#endif
}

inline void transpose16(const uint32_t* const rows[16], uint32_t* out, int stride) {
#ifdef DSPARK_AVX512
  vu v[16];
  for (int i = 0; i < 16; i++) std::memcpy(&v[i], rows[i], 64);
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  for (int c = 0; c < 4; c++) {  // b[4q+c] holds columns c, c+4, c+8, c+12 of rows 4q .. 4q+3
    __m512i x = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), y = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    __m512i z = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), w = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_storeu_si512(out + (c + 0) * stride, _mm512_shuffle_i32x4(x, y, 0x88));
    _mm512_storeu_si512(out + (c + 8) * stride, _mm512_shuffle_i32x4(x, y, 0xdd));
    _mm512_storeu_si512(out + (c + 4) * stride, _mm512_shuffle_i32x4(z, w, 0x88));
    _mm512_storeu_si512(out + (c + 12) * stride, _mm512_shuffle_i32x4(z, w, 0xdd));
  }
#else
  for (int c = 0; c < 16; c += 4) {
    vf column[4];
    columns4(rows, c, column);
    for (int j = 0; j < 4; j++) store(reinterpret_cast<float*>(out) + (c + j) * stride, column[j]);
  }
#endif
}

// Where the keys (or values) of positions [k0, k0 + count) lie: at most two contiguous runs.
template <class T>
struct Span {
  const T* base[2];
  int count[2];
  const T* at(int i, int dim) const {
    return i < count[0] ? base[0] + int64_t(i) * dim : base[1] + int64_t(i - count[0]) * dim;
  }
};

template <class T>
inline Span<T> span_of(const T* head, const Row& r, int dim, int k0, int count) {
  int before = r.prefix_len - k0;
  before = before < 0 ? 0 : before > count ? count : before;
  int64_t own = int64_t(r.own_start) + (k0 > r.prefix_len ? k0 - r.prefix_len : 0);
  return {{head + (int64_t(r.prefix_start) + k0) * dim, head + own * dim}, {before, count - before}};
}

constexpr int ROWS_AHEAD = 16;

// Always inlined: the compiler takes a function that only prefetches for one without effects, and drops calls to it.
DS_INLINE void fetch(const void* p, size_t num_bytes) {
  for (size_t b = 0; b < num_bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 0, 2);
}

// Keys or values in the order in which they are read, and what is read after them. Those a few rows on are asked for all
// the time: runs are too short for the CPU to see a stream in them, and too long to wait for.
template <class T>
struct Stream {
  Span<T> rows;
  int count;
  const T* then;
  int num_then;

  // Elements [from, from + num) of the row that comes ROWS_AHEAD after row i.
  DS_INLINE void fetch_after(int i, int dim, int from, int num) const {
    const int row = i + ROWS_AHEAD, beyond = row - count;
    if (beyond < 0) fetch(rows.at(row, dim) + from, num * sizeof(T));
    else if (beyond < num_then) fetch(then + int64_t(beyond) * dim + from, num * sizeof(T));
  }
};

// out [blocks][dim cells][PACK_KEYS] cells; keys past `count` are zero.
template <class T>
inline void pack_keys(const Stream<T>& keys, int dim, float* out) {
  alignas(64) static const uint32_t zeros[MAX_HEAD_DIM] = {};
  const int cells = dim / per_cell<T>, count = keys.count;
  for (int k = 0; k < count; k += LANES) {
    for (int i = 0; i < LANES; i++) keys.fetch_after(k + i, dim, 0, dim);
    float* block = out + int64_t(k / PACK_KEYS) * cells * PACK_KEYS + k % PACK_KEYS;
    const uint32_t* row[16];
    for (int i = 0; i < 16; i++)
      row[i] = k + i < count ? reinterpret_cast<const uint32_t*>(keys.rows.at(k + i, dim)) : zeros;
    int c = 0;
    for (; c + 16 <= cells; c += 16) {
      const uint32_t* from[16];
      for (int i = 0; i < 16; i++) from[i] = row[i] + c;
      transpose16(from, reinterpret_cast<uint32_t*>(block) + c * PACK_KEYS, PACK_KEYS);
    }
    for (; c < cells; c++)
      for (int i = 0; i < 16; i++) std::memcpy(block + c * PACK_KEYS + i, row[i] + c, 4);
  }
  if ((count + LANES - 1) / LANES % 2)  // the second half of the last block
    for (int c = 0; c < cells; c++)
      store(out + (int64_t(count / PACK_KEYS) * cells + c) * PACK_KEYS + LANES, vf{});
}

}  // namespace ds
