// Builds the work items of a plan.
#pragma once
#include <algorithm>
#include <numeric>
#include <tuple>

#include "attention.hpp"

namespace ds {

inline void make_plan(Plan& p) {
  const int num_rows = int(p.rows.size()), group = p.group(), heads = p.shape.num_kv_heads;
  p.num_tokens = 0;
  for (int i = 0; i < num_rows; i++) {
    p.rows[i].token_start = p.num_tokens;
    p.num_tokens += p.rows[i].num_tokens;
    p.token_row.insert(p.token_row.end(), p.rows[i].num_tokens, i);
  }
  auto shared_end = [&](const Row& r) {  // chunks below it lie in the prefix
    return r.num_tokens > MAX_SPLIT_TOKENS ? 0 : r.prefix_len / CHUNK_KEYS;
  };
  auto key = [&](int i) {
    const Row& r = p.rows[i];
    int end = shared_end(r), first = p.first_chunk(r);
    return end > first ? std::make_tuple(r.prefix_start, end, first) : std::make_tuple(-1, 0, 0);
  };
  p.order.resize(num_rows);
  std::iota(p.order.begin(), p.order.end(), 0);
  std::stable_sort(p.order.begin(), p.order.end(), [&](int a, int b) { return key(a) < key(b); });
  p.partial_at.assign(num_rows, -1);
  for (int at = 0, next; at < num_rows; at = next) {
    for (next = at + 1; next < num_rows && key(p.order[at]) == key(p.order[next]);) next++;
    const bool shared = std::get<0>(key(p.order[at])) >= 0 && next - at > 1;
    const Row& lead = p.rows[p.order[at]];
    if (shared)
      for (int c = p.first_chunk(lead); c < shared_end(lead); c++)
        for (int h = 0; h < heads; h++) p.items.push_back({at, next - at, h, 0, 0, c, 1, true});
    for (int i = at; i < next; i++) {
      const Row& r = p.rows[p.order[i]];
      int first = p.first_chunk(r), end = Plan::end_chunk(r.kv_len + r.num_tokens - 1);
      p.work += int64_t(r.num_tokens) * (r.kv_len + r.num_tokens) * p.shape.num_q_heads;
      if (r.num_tokens <= MAX_SPLIT_TOKENS && end - first > 1) {
        p.partial_at[p.order[i]] = p.num_partials;
        p.num_partials += int64_t(end - first) * heads * r.num_tokens * group;
        for (int c = shared ? shared_end(lead) : first; c < end; c++)
          for (int h = 0; h < heads; h++) p.items.push_back({i, 1, h, 0, r.num_tokens, c, 1, true});
        continue;
      }
      for (int t = 0; t < r.num_tokens; t += TOKEN_TILE) {
        int n = std::min(TOKEN_TILE, r.num_tokens - t), low = 0;
        if (p.shape.window) low = std::max(0, r.kv_len + t + 1 - p.shape.window) / CHUNK_KEYS;
        int stop = Plan::end_chunk(p.last_seen(r, t + n - 1));
        for (int h = 0; h < heads; h++) p.items.push_back({i, 1, h, t, n, low, stop - low, false});
      }
    }
  }
  auto cost = [](const Item& i) { return int64_t(i.num_rows) * i.num_chunks * (i.num_tokens + 1); };
  std::stable_sort(p.items.begin(), p.items.end(), [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
}

}  // namespace ds
