// Threads and scratch memory. The OpenMP runtime is the one that the host process already has.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace ds {

// Grow-only, 64-byte aligned memory of one thread.
template <int TAG>
inline float* scratch(size_t num_floats) {
  struct Owner {
    float* p = nullptr;
    size_t n = 0;
    ~Owner() { std::free(p); }
  };
  static thread_local Owner own;
  if (own.n < num_floats) {
    std::free(own.p);
    own.n = (num_floats + 1023) / 1024 * 1024;
    own.p = static_cast<float*>(std::aligned_alloc(64, own.n * sizeof(float)));
    if (!own.p) std::abort();
  }
  return own.p;
}

struct alignas(64) Counter {
  std::atomic<int> next{0};
};

// One thread's view of a parallel region that is a sequence of phases, each with a loop of its own. All threads pass
// through the same phases. Which thread runs which index never changes a result.
class Team {
 public:
  Team(int id, int size, Counter* counters) : id_(id), size_(size), counters_(counters) {}

  // Indexes 0 .. n-1 in order, each to whoever is free.
  template <class F>
  void share(int n, F&& f) {
    Counter& counter = phase()[0];
    for (int i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  }

  // A contiguous range for every thread; who is done early helps the others.
  template <class F>
  void share_ranges(int n, F&& f) {
    Counter* counters = phase();
    for (int s = 0; s < size_; s++) {
      int owner = (id_ + s) % size_, end = int(int64_t(owner + 1) * n / size_);
      int first = int(int64_t(owner) * n / size_);
      for (int i; (i = first + counters[owner].next.fetch_add(1, std::memory_order_relaxed)) < end;) f(i);
    }
  }

  // Everything before is done and visible.
  void barrier() {
    if (size_ > 1) {
#pragma omp barrier
    }
  }

  bool leads() const { return id_ == 0; }
  int size() const { return size_; }

 private:
  Counter* phase() { return counters_ + size_t(phase_++) * size_; }
  int id_, size_, phase_ = 0;
  Counter* counters_;
};

// Runs f(team) on every thread of the pool, or on this one alone where waking the others does not pay.
template <class F>
inline void run_team(bool worth_it, int num_phases, F&& f) {
  const int size = worth_it ? omp_get_max_threads() : 1;
  std::vector<Counter> counters(size_t(num_phases) * size);
  if (size == 1) {
    Team alone(0, 1, counters.data());
    return f(alone);
  }
#pragma omp parallel num_threads(size)
  {
    // The runtime may give fewer threads than asked for; counters are laid out for at most `size`.
    Team team(omp_get_thread_num(), omp_get_num_threads(), counters.data());
    f(team);
  }
}

template <class F>
inline void parallel(int n, bool worth_it, F&& f) {
  run_team(n > 1 && worth_it, 1, [&](Team& team) { team.share_ranges(n, f); });
}

}  // namespace ds
