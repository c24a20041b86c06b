// The OpenMP run time of thread sanitizer builds. The sanitizer cannot see how the threads of
// libgomp, which is not instrumented, wait for each other, and would report races that are none;
// threads of the standard library it understands. These functions take precedence over those of
// libgomp.
#include <omp.h>

#include <thread>
#include <vector>

namespace {
thread_local int thread_num = 0;
thread_local int max_threads = 4;
}  // namespace

// What the compiler makes of `#pragma omp parallel`; num_threads is 0 without that clause.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  const int count = num_threads == 0 ? max_threads : static_cast<int>(num_threads);
  const int caller = thread_num;
  std::vector<std::thread> team;
  for (int i = 1; i < count; ++i) {
    team.emplace_back([=] {
      thread_num = i;
      body(data);
    });
  }
  thread_num = 0;
  body(data);
  thread_num = caller;
  for (std::thread& thread : team) thread.join();
}

int omp_get_thread_num() noexcept { return thread_num; }
int omp_get_max_threads() noexcept { return max_threads; }
void omp_set_num_threads(int count) noexcept { max_threads = count; }
