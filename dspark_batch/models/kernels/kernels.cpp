// C interface of the kernels. Every function is typed by a flag: is_bf16 chooses bfloat16 storage, else float32.
#include "draw.hpp"
#include "gemm.hpp"
#include "head.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "rows.hpp"
#include "step.hpp"
#include "suffix.hpp"

using namespace ds;

namespace {

constexpr int64_t SMALL = 1 << 14;  // elements below which waking a second thread costs more than it saves

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

#define DS_DISPATCH(is_bf16, ...) \
  if (is_bf16) {                  \
    using T = bf16;               \
    __VA_ARGS__;                  \
  } else {                        \
    using T = float;              \
    __VA_ARGS__;                  \
  }

template <class T>
void attend(const Plan& plan, T* qkv, const Rope& rope, const T* q_norm, const T* k_norm, T* k, T* v, T* out) {
  float* partials = scratch<1>(size_t(plan.num_partials) * plan.partial_stride());
  AttentionPhase<T> phase{{plan, qkv, k, v, out, partials}, rope, qkv, k, v};
  run_team(plan.work * plan.shape.head_dim > 8 * SMALL, phase.NUM_PHASES,
           [&](Team& team) { phase.run(team, q_norm, k_norm); });
}

template <class T>
void linear(const Linear<T>& w, const T* x, int64_t m, const Target<T>& to) {
  run_team(m * w.n * w.k > 8 * SMALL, 1, [&](Team& team) { product(team, w, x, m, to); });
}

}  // namespace

extern "C" {

int ds_abi() { return 6; }

int ds_has_bf16_dot() {
#ifdef DSPARK_DPBF16
  return 1;
#else
  return 0;
#endif
}

int ds_num_threads() { return omp_get_max_threads(); }

void* ds_plan_new(const Shape* shape, const Row* rows, int num_rows) {
  Plan* p = new (std::nothrow) Plan;
  if (!p) return nullptr;
  p->shape = *shape;
  p->rows.assign(rows, rows + num_rows);
  make_plan(*p);
  return p;
}

void ds_plan_free(void* plan) { delete static_cast<Plan*>(plan); }

void ds_attend(int is_bf16, const void* plan, void* qkv, const float* cos, const float* sin, const void* q_norm,
               const void* k_norm, void* k, void* v, void* out) {
  DS_DISPATCH(is_bf16, attend<T>(*static_cast<const Plan*>(plan), as<T>(qkv), {cos, sin}, as<T>(q_norm), as<T>(k_norm),
                                 as<T>(k), as<T>(v), as<T>(out)));
}

void ds_rms_norm(int is_bf16, const void* x, const void* w, void* out, int64_t rows, int64_t n, float eps) {
  DS_DISPATCH(is_bf16, parallel(int(rows), rows * n > SMALL, [=](int r) {
                rms_norm_row(as<T>(x) + r * n, as<T>(w), as<T>(out) + r * n, int(n), eps);
              }));
}

void ds_add_rms_norm(int is_bf16, void* residual, const void* x, const void* w, void* out, int64_t rows, int64_t n,
                     float eps) {
  DS_DISPATCH(is_bf16, parallel(int(rows), rows * n > SMALL, [=](int r) {
                add_rms_norm_row(as<T>(residual) + r * n, as<T>(x) + r * n, as<T>(w), as<T>(out) + r * n, int(n), eps);
              }));
}

void ds_silu_mul(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t n) {
  DS_DISPATCH(is_bf16, parallel(int(rows), rows * n > SMALL, [=](int r) {
                silu_mul_row(as<T>(gate_up) + r * 2 * n, as<T>(out) + r * n, int(n));
              }));
}

void ds_argmax(int is_bf16, const void* x, int64_t rows, int64_t n, int64_t* index, float* margin) {
  DS_DISPATCH(is_bf16, parallel(int(rows), rows * n > 2 * SMALL,
                                [=](int r) { argmax_row(as<T>(x) + r * n, n, index + r, margin + r); }));
}

// Whether a screen is worth having on this CPU.
int ds_can_screen() { return HAS_PAIR_DOT; }

void ds_screen(int is_bf16, const float* packed, int64_t n, int64_t k, const Screen* to) {
  DS_DISPATCH(is_bf16, parallel(int((n + TILE_N - 1) / TILE_N), true,
                                [=](int tile) { pack_screen<T>({packed, nullptr, n, k}, tile, *to); }));
}

// screen: null without one.
void ds_product_argmax(int is_bf16, const float* packed, const void* bias, int64_t n, int64_t k, const Screen* screen,
                       const void* x, int64_t m, int64_t* index, float* value) {
  DS_DISPATCH(is_bf16, const Linear<T> w{packed, as<T>(bias), n, k}; const Best best{index, value};
              if (screen) screened_argmax(w, *screen, as<T>(x), m, best); else product_argmax(w, as<T>(x), m, best));
}

// Row i of `params` draws from row flat[i] of the logits [*, n].
void ds_draw(const float* logits, int64_t n, const DrawParams* params, const int64_t* flat, int64_t count, int64_t* tokens) {
  parallel(int(count), true, [=](int i) { tokens[i] = draw_row(logits + flat[i] * n, n, params[i]); });
}

// out holds ceil(n / 32) * 32 * k elements of the storage type.
void ds_pack(int is_bf16, const void* weight, const int64_t* order, int64_t n, int64_t k, float* out) {
  DS_DISPATCH(is_bf16, parallel(int((n + TILE_N - 1) / TILE_N), true,
                                [=](int t) { pack_tile(as<T>(weight), order, t, n, k, out); }));
}

void ds_linear(int is_bf16, const float* packed, const void* bias, int64_t n, int64_t k, const void* x, int64_t m,
               void* y, int64_t ldy, int32_t epilogue) {
  DS_DISPATCH(is_bf16, linear<T>({packed, as<T>(bias), n, k}, as<T>(x), m, {y, ldy, Epilogue(epilogue)}));
}

void ds_step(int is_bf16, const ModelArgs* model, const StepArgs* step) {
  DS_DISPATCH(is_bf16, Step<T>(*model, *step).run());
}

// Appends counts[i] tokens to ring rings[i]; `tokens` holds them in a row.
void ds_suffix_extend(const SuffixRings* index, const int64_t* rings, const int64_t* tokens, const int64_t* counts,
                      int64_t num_rings) {
  for (int64_t i = 0; i < num_rings; tokens += counts[i++]) suffix_extend(*index, rings[i], tokens, counts[i]);
}

void ds_suffix_clear(const SuffixRings* index, int64_t ring) { suffix_clear(*index, ring); }

// token_ids, confidence: [num_rows, width], the first num_tokens[i] of each are written.
void ds_suffix_choose(const SuffixRings* own, const SuffixRings* shared, const SuffixRules* rules, const int64_t* rings,
                      const int64_t* max_tokens, int64_t num_rows, int64_t width, int64_t* token_ids,
                      double* confidence, int64_t* num_tokens) {
  for (int64_t i = 0; i < num_rows; i++)
    num_tokens[i] = suffix_choose(*own, *shared, rings[i], max_tokens[i], *rules, token_ids + i * width,
                                  confidence + i * width);
}

}  // extern "C"
