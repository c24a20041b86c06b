// What the machine can do at best, as loops to be timed: fused multiply-adds, products of bf16
// vectors (AVX-512-BF16) and tiles (AMX), exponentials, reading memory. To be compiled for the CPU
// that runs it (-march=native).
//
// Every function does its work on `threads` OpenMP threads. limits_*_work says how much of it one
// call does; the caller divides by the time.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#define FLASH_ATTN_ISA limits
#include "cpu/tile_amx.h"

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kAccumulators = 12;  // more than latency times throughput of any FMA unit so far
using Vector = float __attribute__((vector_size(kVectorBytes)));

// Values near one: products neither overflow nor become denormal. Random, for CPUs clock lower when
// operands change many bits.
template <typename T>
T random_vector(int seed) {
  std::minstd_rand bits(seed + 1);
  std::uniform_real_distribution<float> near_one(0.999F, 1.0F);
  std::array<float, sizeof(T) / 4> values;
  for (float& value : values) value = near_one(bits);
  T vector;
  std::memcpy(&vector, values.data(), sizeof(T));
  return vector;
}

float fma_loop(int64_t iterations, int seed) {
  std::array<Vector, kAccumulators> sums;
  for (int i = 0; i < kAccumulators; ++i) sums[i] = random_vector<Vector>(seed + i);
  const Vector factor = random_vector<Vector>(seed + 100);
  const Vector term = random_vector<Vector>(seed + 200) * 1e-3F;
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) sums[i] = sums[i] * factor + term;
  }
  float total = 0;
  for (const Vector& sum : sums) total += sum[0];
  return total;
}

#if defined(__AVX512BF16__)
float dot_loop(int64_t iterations, int seed) {
  __m512 sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = random_vector<__m512>(seed + i);
  const __m512bh a = reinterpret_cast<__m512bh>(random_vector<__m512>(seed + 100));
  const __m512bh b = reinterpret_cast<__m512bh>(random_vector<__m512>(seed + 200));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
  float total = 0;
  for (const __m512& sum : sums) total += sum[0];
  return total;
}
#endif

// 2^x in fp32 to about 2e-7: round to the nearest integer, a polynomial of degree 6 for the
// fraction, the integer into the exponent. Coefficients: Taylor's of 2^x.
inline float exp2_polynomial(float x) {
  x = x < -126.0F ? -126.0F : x;
  const float rounded = std::nearbyint(x);
  const float f = x - rounded;
  float p = 1.5403530e-4F;
  p = p * f + 1.3333558e-3F;
  p = p * f + 9.6181291e-3F;
  p = p * f + 5.5504109e-2F;
  p = p * f + 2.4022651e-1F;
  p = p * f + 6.9314718e-1F;
  p = p * f + 1.0F;
  const int32_t exponent = (static_cast<int32_t>(rounded) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof(power));
  return p * power;
}

constexpr int kExpBlock = 2048;  // floats: 8 KiB in and 8 KiB out stay in L1

float exp_loop(int64_t iterations, int seed) {
  alignas(64) std::array<float, kExpBlock> in;
  alignas(64) std::array<float, kExpBlock> out;
  std::minstd_rand bits(seed + 1);
  std::uniform_real_distribution<float> scores(-20.0F, 0.0F);
  for (float& value : in) value = scores(bits);
  float total = 0;
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 4
    for (int i = 0; i < kExpBlock; ++i) out[i] = exp2_polynomial(in[i]);
    total += out[n % kExpBlock];
    asm volatile("" : : "r"(out.data()) : "memory");
  }
  return total;
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// Asks Linux for the use of the tile registers (Documentation/arch/x86/xstate.rst).
bool amx_permitted() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  return permitted;
}

using Tiles = flash::cpu::limits::TileAmx;

// Random operands in registers.
void load_amx_operands(int seed) {
  alignas(64) std::array<std::array<uint16_t, 512>, 4> operands;
  std::minstd_rand bits(seed + 1);
  std::normal_distribution<float> normal;
  for (auto& operand : operands) {
    for (uint16_t& element : operand) {
      const float value = normal(bits);
      std::memcpy(&element, reinterpret_cast<const char*>(&value) + 2, 2);  // bf16 by truncation
    }
  }
  Tiles::configure();
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
  Tiles::load<4>(operands[0].data(), 64);
  Tiles::load<5>(operands[1].data(), 64);
  Tiles::load<6>(operands[2].data(), 64);
  Tiles::load<7>(operands[3].data(), 64);
}

constexpr int64_t kAmxWork = int64_t{4} * 2 * 16 * 16 * 32;  // operations of one iteration

void multiply_amx_operands(int64_t iterations) {
  for (int64_t n = 0; n < iterations; ++n) {
    Tiles::multiply<0, 4, 6>();
    Tiles::multiply<1, 4, 7>();
    Tiles::multiply<2, 5, 6>();
    Tiles::multiply<3, 5, 7>();
  }
}

void amx_loop(int64_t iterations, int seed) {
  load_amx_operands(seed);
  multiply_amx_operands(iterations);
  Tiles::release();
}

// Operations a second at this moment, the best of three times 20 microseconds.
double amx_rate(double wake_seconds, int seed) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  constexpr int64_t kIterations = 600;
  load_amx_operands(seed);
  for (const auto start = Clock::now(); Seconds(Clock::now() - start).count() < wake_seconds;)
    multiply_amx_operands(kIterations / 4);
  double least = 1.;
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    multiply_amx_operands(kIterations);
    least = std::min(least, Seconds(Clock::now() - start).count());
  }
  Tiles::release();
  return kAmxWork * kIterations / least;
}
#endif

float read_range(const std::byte* begin, int64_t bytes) {
  using Words = uint64_t __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  constexpr int kUnroll = 8;
  Words sums[kUnroll] = {};
  const auto* words = reinterpret_cast<const Words*>(begin);
  const int64_t count = bytes / kVectorBytes / kUnroll * kUnroll;
  for (int64_t i = 0; i < count; i += kUnroll) {
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) sums[j] ^= words[i + j];
  }
  uint64_t total = 0;
  for (const Words& sum : sums) total ^= sum[0];
  return static_cast<float>(total & 1);
}

volatile float sink;  // keeps results alive

template <typename Body>
void on_threads(int threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) body(thread);
}

}  // namespace

extern "C" {

void limits_fma(int threads, int64_t iterations) {
  on_threads(threads, [&](int thread) { sink = fma_loop(iterations, thread); });
}

// Floating-point operations of one iteration of one thread.
int64_t limits_fma_work() { return int64_t{2} * kLanes * kAccumulators; }

// AVX-512-BF16 dot products; no work where the CPU has none.
void limits_dot([[maybe_unused]] int threads, [[maybe_unused]] int64_t iterations) {
#if defined(__AVX512BF16__)
  on_threads(threads, [&](int thread) { sink = dot_loop(iterations, thread); });
#endif
}

// Floating-point operations of one iteration of one thread; 0 without AVX-512-BF16.
int64_t limits_dot_work() {
#if defined(__AVX512BF16__)
  return int64_t{4} * kLanes * kAccumulators;
#else
  return 0;
#endif
}

void limits_exp(int threads, int64_t iterations) {
  on_threads(threads, [&](int thread) { sink = exp_loop(iterations, thread); });
}

// Exponentials of one iteration of one thread.
int64_t limits_exp_work() { return kExpBlock; }

void limits_amx([[maybe_unused]] int threads, [[maybe_unused]] int64_t iterations) {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
  on_threads(threads, [&](int thread) { amx_loop(iterations, thread); });
#endif
}

// Floating-point operations of one iteration of one thread; 0 where AMX cannot be used.
int64_t limits_amx_work() {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
  return amx_permitted() ? kAmxWork : 0;
#else
  return 0;
#endif
}

// Floating-point operations a second that tile products of all threads do at this moment, after
// wake_seconds of them: the tile unit wakes up slowly. 0 where AMX cannot be used.
double limits_amx_rate([[maybe_unused]] int threads, [[maybe_unused]] double wake_seconds) {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
  if (!amx_permitted()) return 0.;
  std::atomic<double> sum = 0.;
  on_threads(threads, [&](int thread) { sum += amx_rate(wake_seconds, thread); });
  return sum;
#else
  return 0.;
#endif
}

// Reads `bytes` bytes, a contiguous share a thread.
void limits_read(int threads, const void* data, int64_t bytes) {
  const int64_t share = bytes / threads;
  on_threads(threads, [&](int thread) {
    sink = read_range(static_cast<const std::byte*>(data) + thread * share, share);
  });
}

}  // extern "C"
