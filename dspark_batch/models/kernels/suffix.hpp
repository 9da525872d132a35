// Lookups of the suffix drafter, on the arrays of drafters/suffix_index.py: which drafts its numpy path would make, to
// the last bit. Tokens and positions are stored plus one, so that fresh zero pages hold none of either.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace ds {

constexpr int MAX_DRAFT = 64, MAX_CANDIDATES = 64;  // one bit each in a word; SuffixConfig keeps to them
constexpr int64_t SLOT_MARGIN = 64;

struct SuffixCell {
  uint64_t key;
  int64_t previous;
};

struct SuffixRings {
  int32_t* tokens;      // [rings, size]
  SuffixCell* cells;    // [rings, size, orders]
  int64_t* newest;      // [rings, size, orders]
  int64_t *start, *end;  // [rings]
  const uint64_t* coefficients;  // [depth], that of the newest token last
  const int64_t* orders;
  int64_t num_orders, size;
};

struct SuffixRules {
  const int64_t* longest;  // by match length, 0 .. depth: tokens that a draft may have
  const double* prior;     // by context length
  double min_survival;
  int64_t max_candidates;
};

struct SuffixRing {
  int32_t* tokens;
  SuffixCell* cells;
  int64_t* newest;
  int64_t start, end, mask, num_orders;

  SuffixRing(const SuffixRings& of, int64_t ring)
      : tokens(of.tokens + ring * of.size),
        cells(of.cells + ring * of.size * of.num_orders),
        newest(of.newest + ring * of.size * of.num_orders),
        start(of.start[ring]),
        end(of.end[ring]),
        mask(of.size - 1),
        num_orders(of.num_orders) {}

  int32_t& token(int64_t position) const { return tokens[position & mask]; }
  SuffixCell& cell(int64_t position, int64_t level) const { return cells[(position & mask) * num_orders + level]; }
  int64_t& bucket(uint64_t key, int64_t level) const {
    const uint64_t spread = (key ^ (key >> 29)) * 0x9E3779B97F4A7C15ull;
    return newest[int64_t((spread >> 32) & uint64_t(mask)) * num_orders + level];
  }
};

// Calls f(level, hash) for each order whose tokens before `position` are of one sequence, shortest first.
template <class F>
inline void for_contexts(const SuffixRings& of, const SuffixRing& ring, int64_t position, F&& f) {
  const int64_t depth = of.orders[of.num_orders - 1];
  uint64_t hash = 0;
  for (int64_t back = 1, level = 0; back <= depth; back++) {
    const int32_t token = ring.token(position - back);
    if (!token) return;
    hash += uint64_t(token) * of.coefficients[depth - back];
    if (back == of.orders[level]) f(level++, hash);
  }
}

inline void suffix_extend(const SuffixRings& of, int64_t at, const int64_t* tokens, int64_t count) {
  const SuffixRing ring(of, at);
  const int64_t end = ring.end + count;
  for (int64_t i = 0; i < count; i++) {
    const int64_t position = ring.end + i;
    ring.token(position) = int32_t(tokens[i] + 1);
    if (tokens[i] < 0) continue;
    for_contexts(of, ring, position, [&](int64_t level, uint64_t key) {
      int64_t& newest = ring.bucket(key, level);
      ring.cell(position, level) = {key, newest};
      newest = position + 1;
    });
  }
  const int64_t oldest = end - (of.size - of.orders[of.num_orders - 1] - SLOT_MARGIN);
  if (oldest > ring.start) of.start[at] = oldest;
  of.end[at] = end;
}

// Forgets a ring at the cost of what it holds.
inline void suffix_clear(const SuffixRings& of, int64_t at) {
  const SuffixRing ring(of, at);
  if (ring.end > of.size) {
    for (int64_t i = 0; i < of.size; i++) ring.tokens[i] = 0;
    for (int64_t i = 0; i < of.size * of.num_orders; i++) ring.newest[i] = 0;
  } else {
    for (int64_t position = 0; position < ring.end; position++) {
      ring.token(position) = 0;
      for (int64_t level = 0; level < of.num_orders; level++) ring.bucket(ring.cell(position, level).key, level) = 0;
    }
  }
  of.start[at] = of.end[at] = 0;
}

struct SuffixDraft {
  double expected = 0.0;
  int64_t num_tokens = 0;
  const SuffixRing* ring = nullptr;
  int64_t position = 0;
  alignas(64) double confidence[MAX_DRAFT];  // by name: g++ 12 takes such arrays on the stack for aligned
};

// Keeps a product from being fused with the sum that follows it.
inline double rounded(double x) {
  asm volatile("" : "+m"(x));
  return x;
}

// Positions at which a query's longest indexed context occurred, newest first, and how far they match it.
struct Occurrences {
  int count = 0;
  alignas(64) int64_t position[MAX_CANDIDATES];
  int64_t match[MAX_CANDIDATES];

  void find(const SuffixRing& in, const uint64_t* hashes, int64_t num_complete, int64_t max_candidates) {
    for (int64_t level = num_complete - 1; level >= 0 && !count; level--) {
      int64_t here = in.bucket(hashes[level], level);
      for (int64_t link = 0; link < max_candidates && here > in.start; link++) {
        const SuffixCell& cell = in.cell(here - 1, level);
        if (cell.key == hashes[level]) position[count++] = here - 1;
        here = cell.previous;
      }
    }
  }

  void measure(const SuffixRing& in, const SuffixRing& query, int64_t depth) {
    for (int i = 0; i < count; i++) {
      int64_t length = 0;
      while (length < depth) {
        const int32_t token = query.token(query.end - 1 - length);
        if (!token || token != in.token(position[i] - 1 - length)) break;
        length++;
      }
      match[i] = length;
    }
  }
};

// The vote of suffix_choice.choose. Candidates are bits of a word; those that agree so far share their set of members.
class Vote {
 public:
  Vote(const SuffixRing& ring, const Occurrences& found, const SuffixRules& rules, int64_t max_tokens)
      : ring_(ring), found_(found), rules_(rules) {
    const uint64_t all = found.count == 64 ? ~0ull : (1ull << found.count) - 1;
    for (int i = 0; i < found.count; i++) {
      limit_[i] = found.match[i] > 0 ? std::min(rules.longest[found.match[i]], max_tokens) : 0;
      members_[i] = all;
      score_[i] = 0.0, survival_[i] = 1.0, length_[i] = 0;
      if (limit_[i] > 0) drafting_ |= 1ull << i;
    }
    going_ = all;
  }

  void run(SuffixDraft& best) {
    for (int64_t k = 0; drafting_; k++) {
      read_tokens(k);
      for (uint64_t rest = going_; rest;) {
        const uint64_t group = members_[__builtin_ctzll(rest)] & going_;
        rest &= ~group;
        split(group, k);
      }
    }
    int winner = 0;
    for (int i = 1; i < found_.count; i++)
      if (score_[i] > score_[winner]) winner = i;
    if (!found_.count) return;
    best.expected = score_[winner], best.num_tokens = length_[winner];
    best.ring = &ring_, best.position = found_.position[winner];
    std::copy_n(confidence_[winner], best.num_tokens, best.confidence);
  }

 private:
  void read_tokens(int64_t k) {
    for (uint64_t rest = going_; rest; rest &= rest - 1) {
      const int i = __builtin_ctzll(rest);
      const int64_t position = found_.position[i] + k;
      token_[i] = position < ring_.end ? ring_.token(position) : 0;
      if (!token_[i]) going_ &= ~(1ull << i);
    }
    drafting_ &= going_;
  }

  void split(uint64_t group, int64_t k) {
    const double could = double(__builtin_popcountll(group)) + 1.0;
    while (group) {
      const int32_t token = token_[__builtin_ctzll(group)];
      uint64_t same = 0;
      for (uint64_t rest = group; rest; rest &= rest - 1)
        same |= uint64_t(token_[__builtin_ctzll(rest)] == token) << __builtin_ctzll(rest);
      group &= ~same;
      const double agree = double(__builtin_popcountll(same));
      for (uint64_t rest = same; rest; rest &= rest - 1) {
        const int i = __builtin_ctzll(rest);
        members_[i] = same;
        if (drafting_ >> i & 1) draft(i, k, (agree + rules_.prior[found_.match[i] + k]) / could);
      }
    }
  }

  void draft(int i, int64_t k, double confidence) {
    survival_[i] = rounded(survival_[i] * confidence);
    const bool keeps = survival_[i] >= rules_.min_survival;
    if (keeps) {
      score_[i] += survival_[i];
      confidence_[i][k] = confidence;
      length_[i] = k + 1;
    }
    if (!keeps || k + 1 >= limit_[i]) drafting_ &= ~(1ull << i);
  }

  const SuffixRing& ring_;
  const Occurrences& found_;
  const SuffixRules& rules_;
  uint64_t going_ = 0, drafting_ = 0;  // candidates with tokens left, and those that are still to be drafted
  uint64_t members_[MAX_CANDIDATES];
  int32_t token_[MAX_CANDIDATES];
  int64_t limit_[MAX_CANDIDATES], length_[MAX_CANDIDATES];
  alignas(64) double confidence_[MAX_CANDIDATES][MAX_DRAFT];
  double score_[MAX_CANDIDATES], survival_[MAX_CANDIDATES];
};

// The better draft for the row in ring `at` of `own`: from that ring, or from the one ring of `shared`. token_ids and
// confidence have max_tokens entries at least. Gives the draft's length.
inline int64_t suffix_choose(const SuffixRings& own, const SuffixRings& shared, int64_t at, int64_t max_tokens,
                             const SuffixRules& rules, int64_t* token_ids, double* confidence) {
  static thread_local std::vector<uint64_t> hashes;
  hashes.resize(size_t(own.num_orders));
  const SuffixRing rings[2] = {{own, at}, {shared, 0}};
  int64_t num_complete = 0;
  for_contexts(own, rings[0], rings[0].end, [&](int64_t level, uint64_t hash) {
    hashes[size_t(level)] = hash;
    num_complete = level + 1;
  });
  SuffixDraft drafts[2];
  for (int i = 0; i < 2; i++) {
    Occurrences found;
    found.find(rings[i], hashes.data(), num_complete, rules.max_candidates);
    found.measure(rings[i], rings[0], own.orders[own.num_orders - 1]);
    Vote(rings[i], found, rules, max_tokens).run(drafts[i]);
  }
  const SuffixDraft& best = drafts[drafts[1].expected > drafts[0].expected];
  for (int64_t k = 0; k < best.num_tokens; k++) {
    token_ids[k] = best.ring->token(best.position + k) - 1;
    confidence[k] = best.confidence[k];
  }
  return best.num_tokens;
}

}  // namespace ds
