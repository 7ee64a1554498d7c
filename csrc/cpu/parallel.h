// Threads of torch's own OpenMP pool, so torch.set_num_threads applies. The caller cuts work into units that do not
// depend on the number of threads, so results do not depend on it.
#pragma once

#include <cstdint>

#ifdef _OPENMP
  #include <omp.h>
#endif

namespace torchweld::cpu {
namespace {

// The least number of elements for a thread of a pass that is bound by memory: with fewer a second thread costs more
// than it gains.
constexpr int64_t kElementsPerThread = 32768;

// How many threads a call may use: one inside a parallel region.
inline int64_t max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// f(thread, team) on up to `threads` threads at once.
template <class F>
void parallel_team(int64_t threads, F&& f) {
#ifdef _OPENMP
  // Small work starts no team, not even a team of one: a forked child has no pool.
  if (threads > 1) {
  #pragma omp parallel num_threads(static_cast<int>(threads))
    f(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
    return;
  }
#endif
  f(static_cast<int64_t>(0), static_cast<int64_t>(1));
}

// f(begin, end) over [0, n), in contiguous ranges of at least `grain`, at most one per thread.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  const int64_t wanted = (n + grain - 1) / grain, limit = wanted > 1 ? max_threads() : 1;
  parallel_team(wanted < limit ? wanted : limit, [&](int64_t thread, int64_t team) {
    const int64_t begin = n * thread / team, end = n * (thread + 1) / team;
    if (begin < end) f(begin, end);
  });
}

// f(task, thread) for every task of [0, n). A free thread takes the next task, so the longest task must come first.
template <class F>
void parallel_queue(int64_t n, int64_t threads, F&& f) {
  int64_t next = 0;
  parallel_team(threads < n ? threads : n, [&](int64_t thread, int64_t) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) f(task, thread);
  });
}

}  // namespace
}  // namespace torchweld::cpu
