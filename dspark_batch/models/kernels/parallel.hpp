// Threads and scratch memory. The OpenMP runtime is the one that the host process already has.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

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
    if (!own.p) throw std::bad_alloc();
  }
  return own.p;
}

// Hands out 0 .. n-1 to the threads of a team, in order, to whoever is free. One Counter per phase of a region.
struct alignas(64) Counter {
  std::atomic<int> next{0};
};

template <class F>
inline void share(Counter& counter, int n, F&& f) {
  for (int i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
}

// Runs f(0) .. f(n-1) on the threads; which thread runs which index never changes a result.
template <class F>
inline void parallel(int n, bool worth_it, F&& f) {
  if (n <= 1 || !worth_it) {
    for (int i = 0; i < n; i++) f(i);
    return;
  }
  Counter counter;
#pragma omp parallel
  share(counter, n, f);
}

}  // namespace ds
