#include "base/cpu/scratch.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace flash::cpu {
namespace {

constexpr size_t kKeepBytes = size_t{64} << 20;
constexpr double kFlopsPerThread = 5e5;  // about 10 us of work: what waking a thread costs

struct Cache {
  char* data = nullptr;
  size_t bytes = 0;
  ~Cache() { std::free(data); }
};
thread_local Cache cache;

char* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// libgomp's threads do not survive fork(); the child would wait for them for ever.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (cache.bytes >= bytes) {
    data_ = cache.data;
    bytes_ = cache.bytes;
    cache.data = nullptr;
    cache.bytes = 0;
  } else {
    std::free(cache.data);
    cache.data = nullptr;
    cache.bytes = 0;
    data_ = allocate(bytes);
  }
}

Scratch::~Scratch() {
  if (bytes_ <= kKeepBytes && bytes_ > cache.bytes) {
    std::free(cache.data);
    cache.data = data_;
    cache.bytes = bytes_;
  } else {
    std::free(data_);
  }
}

int num_threads() { return forked || fork_handler != 0 ? 1 : omp_get_max_threads(); }

int threads_for(double flops) {
  const double wanted = flops / kFlopsPerThread;
  if (wanted < 2) return 1;
  const int limit = num_threads();
  return wanted < limit ? static_cast<int>(wanted) : limit;
}

}  // namespace flash::cpu
