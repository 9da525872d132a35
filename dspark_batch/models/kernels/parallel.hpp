// Threads and scratch memory. The OpenMP runtime is the one that the host process already has.
#pragma once
#include <omp.h>
#include <sched.h>

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

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// One thread's view of a parallel region that is a sequence of phases, each with a loop of its own. All threads pass
// through the same phases. Which thread runs which index never changes a result.
//
// A phase is over when its indexes are done, not when all threads have come: where other processes take a core away, the
// threads that run do the whole work, and the absent one walks through finished phases later. (A barrier of all threads
// costs a scheduler's time slice there, some 300 times a step.)
class Team {
 public:
  Team(int id, int size, Counter* counters) : id_(id), size_(size), counters_(counters) {}

  // Indexes 0 .. n-1 in order, each to whoever is free.
  template <class F>
  void share(int n, F&& f) {
    Counter* counters = phase(n);
    int mine = 0;
    for (int i; (i = counters[0].next.fetch_add(1, std::memory_order_relaxed)) < n; mine++) f(i);
    finish(mine);
  }

  // A contiguous range for every thread; who is done early helps the others.
  template <class F>
  void share_ranges(int n, F&& f) {
    Counter* counters = phase(n);
    int mine = 0;
    for (int s = 0; s < size_; s++) {
      int owner = (id_ + s) % size_, end = int(int64_t(owner + 1) * n / size_);
      int first = int(int64_t(owner) * n / size_);
      for (int i; (i = first + counters[owner].next.fetch_add(1, std::memory_order_relaxed)) < end; mine++) f(i);
    }
    finish(mine);
  }

  // All indexes of the last phase are done, and what they wrote is visible.
  void barrier() const {
    if (!done_) return;
    for (int spins = 0; done_->next.load(std::memory_order_acquire) < expected_; spins++) {
      relax();
      if (spins >= SPINS_BEFORE_YIELD) sched_yield();
    }
  }

  int size() const { return size_; }

  // Of one phase: a counter for every thread's range, and one for the indexes that are done.
  static constexpr size_t counters_of(size_t num_phases, size_t size) { return num_phases * (size + 1); }

 private:
  static constexpr int SPINS_BEFORE_YIELD = 2000;

  Counter* phase(int n) {
    barrier();
    Counter* counters = counters_ + counters_of(size_t(phase_++), size_t(size_));
    done_ = counters + size_, expected_ = n;
    return counters;
  }
  void finish(int mine) {
    if (mine) done_->next.fetch_add(mine, std::memory_order_release);
  }

  int id_, size_, phase_ = 0, expected_ = 0;
  Counter *counters_, *done_ = nullptr;
};

// Runs f(team) on every thread of the pool, or on this one alone where waking the others does not pay.
template <class F>
inline void run_team(bool worth_it, int num_phases, F&& f) {
  const int size = worth_it ? omp_get_max_threads() : 1;
  std::vector<Counter> counters(Team::counters_of(size_t(num_phases), size_t(size)));
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
