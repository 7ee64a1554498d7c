// Threads: torch's own OpenMP pool, so torch.set_num_threads is honoured. Work is cut by the caller into units that do
// not depend on the number of threads, so results do not either.
#pragma once

#include <cstdint>

#ifdef _OPENMP
  #include <omp.h>
#endif

namespace torchweld::cpu {
namespace {

// f(begin, end) over [0, n), in contiguous ranges of at least `grain`, at most one per thread.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
#ifdef _OPENMP
  const int64_t wanted = (n + grain - 1) / grain;
  // Not even a team of one is started for small work: a forked child has no pool to start it from.
  const int64_t threads = wanted > 1 && !omp_in_parallel() ? (wanted < omp_get_max_threads() ? wanted : omp_get_max_threads()) : 1;
  if (threads > 1) {
  #pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
      const int64_t begin = n * t / team, end = n * (t + 1) / team;
      if (begin < end) f(begin, end);
    }
    return;
  }
#endif
  if (n > 0) f(static_cast<int64_t>(0), n);
}

}  // namespace
}  // namespace torchweld::cpu
