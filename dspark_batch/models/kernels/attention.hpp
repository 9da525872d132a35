// Ragged attention over a slot cache.
//
// Keys are cut into chunks of CHUNK_KEYS at multiples of CHUNK_KEYS of the row's own positions, whatever the batch, the
// threads and the sharing of prefixes. A chunk gives every query its maximum, its sum of exponentials and its weighted
// sum of values; these are folded in the order of the chunks. So a token's result is a function of the token and of its
// row's keys and values alone, bit for bit.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "keys.hpp"
#include "parallel.hpp"
#include "vec.hpp"

namespace ds {

constexpr int CHUNK_KEYS = 256;
constexpr int QUERY_TILE = HAS_FEW_SUMS ? 3 : 6;  // queries that one micro-kernel call keeps in registers
constexpr int MAX_SPLIT_TOKENS = 16;  // longer slices are cut by tokens, shorter ones by chunks
constexpr int TOKEN_TILE = 32;

struct Shape {
  int32_t num_q_heads, num_kv_heads, head_dim, window;
  int64_t cache_tokens;  // N of the cache [Hkv, N, D]
  float scale, norm_eps;
  int32_t is_causal;  // else the tokens of a slice see all of each other; then without a window
};

struct Item {
  int32_t row, num_rows, kv_head, token0, num_tokens, chunk0, num_chunks;
  bool split;  // one chunk into the partials of its rows, else all chunks straight to the output
};

struct Plan {
  Shape shape;
  std::vector<Row> rows;
  std::vector<int32_t> order;       // rows, those that share a prefix side by side
  std::vector<int32_t> token_row;   // [T]
  std::vector<int64_t> partial_at;  // [R] first partial of a row, -1 where the row is not split
  std::vector<Item> items;
  int64_t num_partials = 0, work = 0;
  int num_tokens = 0;

  int group() const { return shape.num_q_heads / shape.num_kv_heads; }
  int first_chunk(const Row& r) const {
    int lo = shape.window ? r.kv_len + 1 - shape.window : 0;
    return lo > 0 ? lo / CHUNK_KEYS : 0;
  }
  static int end_chunk(int last_position) { return last_position / CHUNK_KEYS + 1; }
  // The last position that token t of a slice sees.
  int last_seen(const Row& r, int t) const { return r.kv_len + (shape.is_causal ? t : r.num_tokens - 1); }
  int partial_stride() const { return shape.head_dim + 2; }
};

// --- one chunk -----------------------------------------------------------------------------------------------------

template <class T>
struct Query {
  const T* q;
  int lo, hi;      // visible keys of this chunk, relative to its first key
  float* partial;  // max, sum, D weighted values
};

template <class T, int NQ>
inline void score_block(const Query<T>* qs, const float* block, int cells, float scale, float* s) {
  vf acc[NQ][2] = {};
  for (int c = 0; c < cells; c++) {
    vf k0 = load(block + c * PACK_KEYS), k1 = load(block + c * PACK_KEYS + LANES);
    for (int i = 0; i < NQ; i++) {
      vf x = broadcast_cell(qs[i].q + c * per_cell<T>);
      acc[i][0] = dot_cell<T>(acc[i][0], k0, x);
      acc[i][1] = dot_cell<T>(acc[i][1], k1, x);
    }
  }
  for (int i = 0; i < NQ; i++) {
    store(s + i * CHUNK_KEYS, acc[i][0] * scale);
    store(s + i * CHUNK_KEYS + LANES, acc[i][1] * scale);
  }
}

// As score_block on keys that are not packed: what one call uses need not be written and read again. Keys past the last
// count as zero. Sums run in the same order.
template <class T, int NQ>
inline void score_rows(const Query<T>* qs, const Stream<T>& keys, int k, int dim, float scale, float* s) {
  alignas(64) static const uint32_t zeros[MAX_HEAD_DIM] = {};
  const int cells = dim / per_cell<T>;
  const uint32_t* row[16];
  for (int i = 0; i < 16; i++)
    row[i] = k + i < keys.count ? reinterpret_cast<const uint32_t*>(keys.rows.at(k + i, dim)) : zeros;
  vf acc[NQ] = {};
  constexpr int ASKED = 64 * per_cell<T>;  // elements at a time: 16 rows, evenly
  for (int c = 0, after = k, from = 0; c < cells; c += 4) {
    keys.fetch_after(after, dim, from, ASKED);
    for (from += ASKED; from >= dim; from -= dim) after++;
    vf column[4];
    columns4(row, c, column);
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < NQ; i++) acc[i] = dot_cell<T>(acc[i], column[j], broadcast_cell(qs[i].q + (c + j) * per_cell<T>));
  }
  for (int i = 0; i < NQ; i++) store(s + i * CHUNK_KEYS, acc[i] * scale);
}

// Two vectors of T at p, as the kernels keep them: in order, or (bf16) the even and the odd elements, which takes no shuffle.
inline void load_pair(const float* p, vf& a, vf& b) { a = load(p), b = load(p + LANES); }
inline void load_pair(const bf16* p, vf& a, vf& b) {
  vu both;
  std::memcpy(&both, p, 64);
  a = (vf)(both << 16), b = (vf)(both & 0xffff0000u);
}
// Writes sums over such pairs in order.
inline void store_pair(const float*, float* to, vf a, vf b) { store(to, a), store(to + LANES, b); }
inline void store_pair(const bf16*, float* to, vf a, vf b) {
#ifdef DSPARK_AVX512
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(to, (vf)_mm512_permutex2var_ps((__m512)a, low, (__m512)b));
  store(to + LANES, (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), (__m512)b));
#else
  for (int i = 0; i < LANES; i++) to[2 * i] = a[i], to[2 * i + 1] = b[i];
#endif
}

// Sums of p over NP pairs of vectors of every value in [k0, k1).
template <class T, int NQ, int NP>
inline void value_block(const Query<T>* qs, const Stream<T>& stream, int dim, int at, int k0, int k1, const float* p) {
  const Span<T>& values = stream.rows;
  vf acc[NQ][2 * NP] = {};
  for (int part = 0; part < 2; part++) {
    int first = part ? values.count[0] : 0, last = part ? values.count[0] + values.count[1] : values.count[0];
    int from = k0 > first ? k0 : first, to = k1 < last ? k1 : last;
    for (int k = from; k < to; k++) {
      const T* v = values.base[part] + int64_t(k - first) * dim + at;
      stream.fetch_after(k, dim, at, 2 * NP * LANES);
      vf x[2 * NP];
#pragma GCC unroll 8
      for (int j = 0; j < NP; j++) load_pair(v + 2 * j * LANES, x[2 * j], x[2 * j + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < NQ; i++) {
        vf w = splat(p[i * CHUNK_KEYS + k]);
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NP; j++) acc[i][j] = fma(w, x[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NP; j++)
      store_pair(static_cast<const T*>(nullptr), qs[i].partial + 2 + at + 2 * j * LANES, acc[i][2 * j], acc[i][2 * j + 1]);
}

// The same over the last vector of an odd number.
template <class T, int NQ>
inline void value_rest(const Query<T>* qs, const Span<T>& values, int dim, int k0, int k1, const float* p) {
  const int at = dim - LANES;
  vf acc[NQ] = {};
  for (int k = k0; k < k1; k++) {
    vf x = load(values.at(k, dim) + at);
    for (int i = 0; i < NQ; i++) acc[i] = fma(splat(p[i * CHUNK_KEYS + k]), x, acc[i]);
  }
  for (int i = 0; i < NQ; i++) store(qs[i].partial + 2 + at, acc[i]);
}

// Scores to exponentials in place; maximum and sum into the partial.
template <class T>
inline void exponentials(const Query<T>& q, int k0, int k1, float* s) {
  alignas(64) float lane[LANES];
  for (int i = 0; i < LANES; i++) lane[i] = float(i);
  const vf none = splat(-std::numeric_limits<float>::infinity()), index = load(lane);
  vf top = none, sum = {};
  for (int k = k0; k < k1; k += LANES) {
    vf x = load(s + k);
    if (k < q.lo || k + LANES > q.hi) {
      vf at = index + float(k);
      vi seen = (vi)(at >= splat(float(q.lo))) & (vi)(at < splat(float(q.hi)));
      x = select(seen, x, none);
      store(s + k, x);
    }
    top = vmax(top, x);
  }
  float m = hmax(top);
  if (m == -std::numeric_limits<float>::infinity()) m = 0;
  for (int k = k0; k < k1; k += LANES) {
    vf e = exp_neg(load(s + k) - m);
    store(s + k, e);
    sum += e;
  }
  q.partial[0] = q.hi > q.lo ? m : -std::numeric_limits<float>::infinity();
  q.partial[1] = hsum(sum);
}

// Keys of a chunk: packed, or null where they are read as they lie. Then its values.
template <class T>
struct Chunk {
  const float* packed;
  Stream<T> keys, values;
};

template <class T, int NQ>
void chunk_tile(const Query<T>* qs, const Chunk<T>& chunk, int dim, float scale, float* s) {
  int lo = CHUNK_KEYS, hi = 0, cells = dim / per_cell<T>;
  for (int i = 0; i < NQ; i++) {
    if (qs[i].lo >= qs[i].hi) continue;
    lo = qs[i].lo < lo ? qs[i].lo : lo;
    hi = qs[i].hi > hi ? qs[i].hi : hi;
  }
  if (lo >= hi) lo = hi = 0;
  int from = lo / PACK_KEYS * PACK_KEYS, to = (hi + PACK_KEYS - 1) / PACK_KEYS * PACK_KEYS;
  for (int k = from; k < to; k += PACK_KEYS) {
    if (!chunk.packed) {
      score_rows<T, NQ>(qs, chunk.keys, k, dim, scale, s + k);
      score_rows<T, NQ>(qs, chunk.keys, k + LANES, dim, scale, s + k + LANES);
      continue;
    }
    score_block<T, NQ>(qs, chunk.packed + int64_t(k) * cells, cells, scale, s + k);
  }
  for (int i = 0; i < NQ; i++) exponentials(qs[i], from, to, s + i * CHUNK_KEYS);
  int at = 0;
  for (; SUMS >= 4 * QUERY_TILE && at + 64 <= dim; at += 64) value_block<T, NQ, 2>(qs, chunk.values, dim, at, lo, hi, s);
  for (; at + 32 <= dim; at += 32) value_block<T, NQ, 1>(qs, chunk.values, dim, at, lo, hi, s);
  if (at < dim) value_rest<T, NQ>(qs, chunk.values.rows, dim, lo, hi, s);
}

template <class T>
void chunk_attend(const Query<T>* qs, int num, Chunk<T> chunk, int dim, float scale) {
  alignas(64) float s[QUERY_TILE * CHUNK_KEYS];
  int i = 0;
  for (; i + QUERY_TILE <= num; i += QUERY_TILE) {
    chunk_tile<T, QUERY_TILE>(qs + i, chunk, dim, scale, s);
    chunk.values.count = chunk.values.num_then = 0;  // nothing is left to ask for
  }
  switch (num - i) {
    case 5: return chunk_tile<T, 5>(qs + i, chunk, dim, scale, s);
    case 4: return chunk_tile<T, 4>(qs + i, chunk, dim, scale, s);
    case 3: return chunk_tile<T, 3>(qs + i, chunk, dim, scale, s);
    case 2: return chunk_tile<T, 2>(qs + i, chunk, dim, scale, s);
    case 1: return chunk_tile<T, 1>(qs + i, chunk, dim, scale, s);
    default: return;
  }
}

// total = total + part, both [max, sum, D values]; an empty part changes nothing.
inline void fold(float* total, const float* part, int dim) {
  float m = total[0] > part[0] ? total[0] : part[0];
  if (part[1] == 0.0f) return;
  vf a = exp_neg(splat(total[0] - m)), b = exp_neg(splat(part[0] - m));
  total[0] = m;
  total[1] = a[0] * total[1] + b[0] * part[1];
  for (int d = 0; d < dim; d += LANES) {
    vf scaled = b * load(part + 2 + d);
    store(total + 2 + d, fma(a, load(total + 2 + d), scaled));
  }
}

inline void clear(float* total, int dim) {
  total[0] = -std::numeric_limits<float>::infinity();
  for (int d = 1; d < dim + 2; d++) total[d] = 0;
}

template <class T>
inline void finish(const float* total, int dim, T* out) {
  vf inv = splat(1.0f / total[1]);
  for (int d = 0; d < dim; d += LANES) store(out + d, load(total + 2 + d) * inv);
}

// --- items ---------------------------------------------------------------------------------------------------------

template <class T>
struct Attend {
  const Plan& plan;
  const T* qkv;  // [T, (Hq + 2 Hkv) D], after rotation
  const T *k, *v;  // one layer: [Hkv, N, D]
  T* out;          // [T, Hq D]
  float* partials;

  int qkv_width() const { return (plan.shape.num_q_heads + 2 * plan.shape.num_kv_heads) * plan.shape.head_dim; }
  const T* head(const T* cache, int kv_head) const {
    return cache + int64_t(kv_head) * plan.shape.cache_tokens * plan.shape.head_dim;
  }
  int chunks_of(const Row& r) const {
    return Plan::end_chunk(r.kv_len + r.num_tokens - 1) - plan.first_chunk(r);
  }
  // [chunk][query] partials of a split row and KV head
  float* partial(int row, int kv_head, int chunk, int query) const {
    const Row& r = plan.rows[row];
    int queries = r.num_tokens * plan.group();
    int64_t i = plan.partial_at[row] + (int64_t(kv_head) * chunks_of(r) + chunk - plan.first_chunk(r)) * queries + query;
    return partials + i * plan.partial_stride();
  }

  void bounds(Query<T>& q, int position, int k0) const {
    int window = plan.shape.window, lo = window ? position + 1 - window : 0;
    q.hi = position + 1 - k0 < CHUNK_KEYS ? position + 1 - k0 : CHUNK_KEYS;
    q.lo = lo > k0 ? lo - k0 : 0;
    if (q.hi < 0) q.hi = 0;
  }

  // The first keys of a chunk that lie in the cache already.
  std::pair<const T*, int> first_keys(const Row& r, int kv_head, int chunk) const {
    const int k0 = chunk * CHUNK_KEYS, left = r.kv_len - k0;
    const int count = left < 0 ? 0 : left < ROWS_AHEAD ? left : ROWS_AHEAD;
    return {span_of(head(k, kv_head), r, plan.shape.head_dim, k0, count).at(0, plan.shape.head_dim), count};
  }

  // next: what this thread will probably run afterwards, or null.
  void run(const Item& item, const Item* next) const {
    const int dim = plan.shape.head_dim, group = plan.group(), stride = plan.partial_stride();
    int count = 0;
    for (int i = 0; i < item.num_rows; i++) count += plan.rows[plan.order[item.row + i]].num_tokens * group;
    if (!item.split) count = item.num_tokens * group;
    static thread_local std::vector<Query<T>> qs;
    qs.resize(count);
    float* keys = scratch<0>(CHUNK_KEYS * dim + size_t(item.split ? 0 : 2 * count * stride));
    float *parts = keys + CHUNK_KEYS * dim, *totals = parts + size_t(count) * stride;
    if (!item.split)
      for (int i = 0; i < count; i++) clear(totals + i * stride, dim);
    for (int chunk = item.chunk0; chunk < item.chunk0 + item.num_chunks; chunk++) {
      const int k0 = chunk * CHUNK_KEYS;
      int n = 0, last = 0;
      for (int i = 0; i < item.num_rows; i++) {
        int index = plan.order[item.row + i];
        const Row& r = plan.rows[index];
        int t0 = item.split ? 0 : item.token0, t1 = item.split ? r.num_tokens : item.token0 + item.num_tokens;
        for (int t = t0; t < t1; t++)
          for (int g = 0; g < group; g++, n++) {
            Query<T>& q = qs[n];
            q.q = qkv + int64_t(r.token_start + t) * qkv_width() + (item.kv_head * group + g) * dim;
            q.partial = item.split ? partial(index, item.kv_head, chunk, t * group + g) : parts + n * stride;
            bounds(q, plan.last_seen(r, t), k0);
            last = q.hi > last ? q.hi : last;
          }
      }
      const Row& r = plan.rows[plan.order[item.row]];
      const bool is_last = chunk + 1 == item.chunk0 + item.num_chunks;
      std::pair<const T*, int> then{nullptr, 0};
      if (!is_last) then = first_keys(r, item.kv_head, chunk + 1);
      else if (next) then = first_keys(plan.rows[plan.order[next->row]], next->kv_head, next->chunk0);
      const Span<T> own_keys = span_of(head(k, item.kv_head), r, dim, k0, last);
      const Span<T> own_values = span_of(head(v, item.kv_head), r, dim, k0, last);
      const Chunk<T> read{n > QUERY_TILE ? keys : nullptr,
                          {own_keys, last, own_values.at(0, dim), last < ROWS_AHEAD ? last : ROWS_AHEAD},
                          {own_values, last, then.first, then.second}};
      if (read.packed) pack_keys(read.keys, dim, keys);
      chunk_attend(qs.data(), n, read, dim, plan.shape.scale);
      if (!item.split)
        for (int i = 0; i < n; i++) fold(totals + i * stride, qs[i].partial, dim);
    }
    if (item.split) return;
    int token = plan.rows[plan.order[item.row]].token_start + item.token0;
    for (int i = 0; i < count; i++) {
      T* to = out + (int64_t(token + i / group) * plan.shape.num_q_heads + item.kv_head * group + i % group) * dim;
      finish(totals + i * stride, dim, to);
    }
  }

  // All chunks of one row's queries of one token.
  void combine(int token) const {
    int index = plan.token_row[token];
    if (plan.partial_at[index] < 0) return;
    const int dim = plan.shape.head_dim, group = plan.group();
    const Row& r = plan.rows[index];
    alignas(64) float total[MAX_HEAD_DIM + 2];
    for (int h = 0; h < plan.shape.num_q_heads; h++) {
      clear(total, dim);
      int query = (token - r.token_start) * group + h % group;
      for (int c = plan.first_chunk(r), end = c + chunks_of(r); c < end; c++)
        fold(total, partial(index, h / group, c, query), dim);
      finish(total, dim, out + (int64_t(token) * plan.shape.num_q_heads + h) * dim);
    }
  }
};

}  // namespace ds
