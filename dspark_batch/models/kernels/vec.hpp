// 16 float lanes, storage types and the dot step that every kernel is built from.
//
// Only this file and keys.hpp know instruction sets. Vector extensions of GCC and Clang lower to whatever the machine
// has; intrinsics replace the few steps that compilers do not find. DSPARK_GENERIC switches the intrinsics off.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(DSPARK_GENERIC)
#define DSPARK_AVX512 1
#include <immintrin.h>
#if defined(__AVX512BF16__)
#define DSPARK_DPBF16 1
#endif
#else
#include "wide.hpp"
#if defined(__AVX2__) && !defined(DSPARK_GENERIC)
#define DSPARK_AVX2 1
#include <immintrin.h>
#endif
#endif

// For what only is fast in registers: passed by reference to a function of its own, sums lie in memory.
#define DS_INLINE __attribute__((always_inline)) inline

namespace ds {

#ifdef DSPARK_AVX512
typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(64)));
constexpr int SUMS = 24;  // vectors that a loop may sum in: what is left of the registers holds its operands
constexpr int REGISTER_BYTES = 64;
#else
typedef Wide<float> vf;
typedef Wide<int32_t> vi;
typedef Wide<uint32_t> vu;
constexpr int SUMS = 6;  // twelve registers of AVX, of sixteen
#endif
constexpr bool HAS_FEW_SUMS = SUMS < 12;

constexpr int LANES = 16;

struct bf16 {
  uint16_t bits;
};

inline float widen(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float widen(float x) { return x; }

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

DS_INLINE vf splat(float x) { return vf{} + x; }
DS_INLINE vf select(vi where, vf a, vf b) { return (vf)(((vi)a & where) | ((vi)b & ~where)); }

#ifdef DSPARK_AVX512
DS_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, 64);
  return v;
}
DS_INLINE void store(float* p, vf v) { std::memcpy(p, &v, 64); }
DS_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
DS_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
DS_INLINE vf load(const bf16* p) {
  __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}
DS_INLINE float hmax(vf v) { return _mm512_reduce_max_ps((__m512)v); }
DS_INLINE float hsum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
DS_INLINE vf to_float(vi v) { return (vf)_mm512_cvtepi32_ps((__m512i)v); }
#else
DS_INLINE vf load(const float* p) { return vf::at(p); }
DS_INLINE void store(float* p, const vf& v) { v.to(p); }
DS_INLINE vf fma(const vf& a, const vf& b, const vf& c) { return a * b + c; }
DS_INLINE vf vmax(const vf& a, const vf& b) {
  vf v;
  for (int i = 0; i < vf::PARTS; i++) v.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return v;
}
typedef uint16_t Halves __attribute__((vector_size(REGISTER_BYTES / 2)));  // the bf16 of one register of floats
DS_INLINE vf load(const bf16* p) {
  vu v;
  for (int i = 0; i < vu::PARTS; i++) {
    Halves h;
    std::memcpy(&h, p + i * vu::PER_PART, sizeof h);
    v.part[i] = __builtin_convertvector(h, vu::Part) << 16;
  }
  return (vf)v;
}
template <class F>
DS_INLINE float folded(const vf& v, F&& f) {
  float s[LANES];
  store(s, v);
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; i++) s[i] = f(s[i], s[i + w]);
  return s[0];
}
DS_INLINE float hmax(const vf& v) {
  return folded(v, [](float a, float b) { return a > b ? a : b; });
}
DS_INLINE float hsum(const vf& v) {
  return folded(v, [](float a, float b) { return a + b; });
}
DS_INLINE vf to_float(const vi& v) {
  vf f;
  for (int i = 0; i < vf::PARTS; i++) f.part[i] = __builtin_convertvector(v.part[i], vf::Part);
  return f;
}
#endif

// Small integers: 16 lanes of two int8 each, as int16, and acc += their products with two int16 that all lanes share.
#ifdef DSPARK_AVX512
constexpr bool HAS_PAIR_DOT = true;
DS_INLINE vi load_pairs(const int8_t* p) { return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
DS_INLINE vi dot_pair(vi acc, vi w, vi x) {
#ifdef __AVX512VNNI__
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#else
  return acc + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#endif
}
#elif defined(DSPARK_AVX2)
constexpr bool HAS_PAIR_DOT = true;
DS_INLINE vi load_pairs(const int8_t* p) {
  vi v;
  for (int i = 0; i < vi::PARTS; i++)
    v.part[i] = (vi::Part)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * i)));
  return v;
}
DS_INLINE vi dot_pair(const vi& acc, const vi& w, const vi& x) {
  vi v;
  for (int i = 0; i < vi::PARTS; i++)
    v.part[i] = acc.part[i] + (vi::Part)_mm256_madd_epi16((__m256i)w.part[i], (__m256i)x.part[i]);
  return v;
}
#else
constexpr bool HAS_PAIR_DOT = false;  // a compiler's own way is slower than the product in float
DS_INLINE vi load_pairs(const int8_t*) { return vi{}; }
DS_INLINE vi dot_pair(const vi& acc, const vi&, const vi&) { return acc; }
#endif

DS_INLINE void store(bf16* p, vf v) {
#ifdef DSPARK_DPBF16
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, 32);
#elif defined(DSPARK_AVX512)
  for (int i = 0; i < LANES; i++) p[i] = narrow<bf16>(v[i]);
#else
  const vu u = (vu)v, even = u + 0x7fffu + ((u >> 16) & 1u), nan = (u >> 16) | 0x40u;
  const vu kept = (vu)select((vi)(u & 0x7fffffffu) > 0x7f800000, (vf)nan, (vf)(even >> 16));
  for (int i = 0; i < vu::PARTS; i++) {
    Halves h = __builtin_convertvector(kept.part[i], Halves);
    std::memcpy(p + i * vu::PER_PART, &h, sizeof h);
  }
#endif
}

// What `store` would keep of v, back in float: the rounding points of a bf16 model.
template <class T>
DS_INLINE vf rounded(vf v);
template <>
DS_INLINE vf rounded<float>(vf v) {
  return v;
}
template <>
DS_INLINE vf rounded<bf16>(vf v) {
  alignas(64) bf16 t[LANES];
  store(t, v);
  return load(t);
}

// A "cell" is 32 bits along the contraction: one float, or two bf16. cells<T>(k) of them hold k elements.
template <class T>
constexpr int per_cell = 4 / int(sizeof(T));

// acc += w . x over one cell, for 16 lanes of w and one (broadcast) cell x.
template <class T>
DS_INLINE vf dot_cell(vf acc, vf w, vf x);
template <>
DS_INLINE vf dot_cell<float>(vf acc, vf w, vf x) {
  return fma(w, x, acc);
}
template <>
DS_INLINE vf dot_cell<bf16>(vf acc, vf w, vf x) {
#ifdef DSPARK_DPBF16
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)w, (__m512bh)(__m512i)x);
#else
  vu wu = (vu)w, xu = (vu)x;
  acc = fma((vf)(wu << 16), (vf)(xu << 16), acc);
  return fma((vf)(wu & 0xffff0000u), (vf)(xu & 0xffff0000u), acc);
#endif
}

template <class T>
DS_INLINE vf broadcast_cell(const T* p) {
#ifdef DSPARK_AVX512
  int32_t i;
  std::memcpy(&i, p, 4);
  return (vf)_mm512_castsi512_ps(_mm512_set1_epi32(i));
#else
  uint32_t i;
  std::memcpy(&i, p, 4);
  return (vf)(vu{} + i);
#endif
}

// exp for x <= 0 (also -inf); relative error below 2e-7; exp(0) == 1 exactly; below -87 it is 0.
DS_INLINE vf exp_neg(vf x) {
  vf c = vmax(x, splat(-87.0f));
#ifdef DSPARK_AVX512
  vf n = (vf)_mm512_roundscale_ps((__m512)(c * 1.44269504088896341f), 8);
  vi k = (vi)_mm512_cvtps_epi32((__m512)n);
#else
  vf shifted = c * 1.44269504088896341f - 0.5f;
  vi k;
  for (int i = 0; i < vf::PARTS; i++) k.part[i] = __builtin_convertvector(shifted.part[i], vi::Part);
  vf n = to_float(k);
#endif
  vf r = fma(n, splat(-0.693359375f), c);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  vf e = fma(p * r, r, r) + 1.0f;
  vf scaled = (vf)((vi)e + (k << 23));
  return (vf)((vi)scaled & (vi)(x >= splat(-87.0f)));
}

// x * sigmoid(x)
DS_INLINE vf silu(vf x) {
  vf z = exp_neg((vf)((vi)x | INT32_MIN));
  vf sigmoid = select((vi)(x < vf{}), z, splat(1.0f)) / (1.0f + z);
  return x * sigmoid;
}

}  // namespace ds
